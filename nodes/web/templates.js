// The pack's templates in the order of their numbers, large enough to be read, and what a graph needs that is not there,
// before it runs.

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

const PACK = decodeURIComponent(new URL(import.meta.url).pathname.match(/extensions\/([^/]+)\//)[1])
const CHOICES = {
    SoftREPADataset: ["folder", "below ComfyUI's input folder. Put pictures with captions there"],
    SoftREPALoadTokens: ["tokens_name", "in models/softrepa. Put token files there"],
}
const IS_MODEL = /\.safetensors$/ // the frontend itself says that these are missing
const OFF = [2, 4] // muted, bypassed
const READABLE = 0.6 // scale of the canvas: just below, the classic view writes no text
const LEFT = 110 // where a template then begins, in pixels of the screen

// the server lists files in whatever order the disk has them
const listed = api.getWorkflowTemplates
api.getWorkflowTemplates = async function () {
    const found = await listed.call(this)
    found[PACK]?.sort()
    return found
}

/** The frontend opens a template so small that all of it can be seen; rather its right end is out of sight. */
function enlarge() {
    const { ds } = app.canvas
    const nodes = app.graph._nodes
    // a graph that somebody saved says where it was looked at
    if (app.graph.extra?.ds || ds.scale >= READABLE || !nodes.some(({ type }) => type.startsWith("SoftREPA"))) return
    const [left, top] = [0, 1].map((axis) => Math.min(...nodes.map(({ pos }) => pos[axis])))
    const above = (top + ds.offset[1]) * ds.scale
    ds.scale = READABLE
    ds.offset = [LEFT / READABLE - left, above / READABLE - top]
    app.canvas.setDirty(true, true)
}

let shown = []

app.registerExtension({
    name: "SoftREPA.Templates",
    afterConfigureGraph() {
        enlarge()
        const toast = app.extensionManager.toast
        shown.forEach((message) => toast.remove(message))
        shown = app.graph._nodes.flatMap((node) => {
            const [name, place] = CHOICES[node.type] ?? []
            const widget = node.widgets?.find((one) => one.name === name)
            const isLinked = node.inputs?.some((input) => input.widget?.name === name && input.link != null)
            const choices = widget?.options?.values
            if (!widget?.value || isLinked || IS_MODEL.test(widget.value) || OFF.includes(node.mode)) return []
            if (!Array.isArray(choices) || choices.includes(widget.value)) return []
            const detail = `There is no "${widget.value}" ${place}, press R, and choose one before you run.`
            return [{ severity: "warn", summary: node.title, detail }]
        })
        shown.forEach((message) => toast.add(message))
    },
})
