// Lists of token files are right as soon as one was written, without pressing R.

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

app.registerExtension({
    name: "SoftREPA.NewTokens",
    setup() {
        // older frontends know only the second, which also shows a message
        api.addEventListener("softrepa.new_tokens", () => (app.reloadNodeDefs ?? app.refreshComboInNodes).call(app))
    },
})
