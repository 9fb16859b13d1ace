// "softrepa" finds the loader first. All ids of this pack begin with the word, and the search would put the shortest
// one first.

import { app } from "../../scripts/app.js"

const FIRST = "SoftREPALoadTokens"
const STARTS_WITH_IT = 1 // the search's rank of a name that begins with the words

app.registerExtension({
    name: "SoftREPA.Search",
    beforeRegisterVueAppNodeDefs(definitions) {
        for (const definition of definitions.filter((one) => one.name === FIRST)) {
            definition.postProcessSearchScores = ([rank, ...others]) => [
                rank === STARTS_WITH_IT ? rank / 2 : rank,
                0,
                ...others,
            ]
        }
    },
})
