// The curves of a training run in its node, while it goes on: hover to read, drag to zoom, double-click for all of it.

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

const NODE = "SoftREPATrainTokens"
const HEIGHT = 260
const WIDTH = 360 // of a new node: room for a line of the header beside its button
const MARGIN = { left: 46, right: 10, top: 20, bottom: 18 }
const COLOURS = { batch: "#4a9bd9", heldOut: "#e0803a", muted: "var(--descrip-text, #999)" }
const STYLE = `
.softrepa-curves { display: flex; flex-direction: column; gap: 4px; box-sizing: border-box; width: 100%; height: 100%;
    padding: 6px 8px; border-radius: 6px; background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd);
    font: 12px/1.4 sans-serif; user-select: none; }
.softrepa-curves header { display: flex; gap: 8px; align-items: start; min-height: 34px; }
.softrepa-curves header div { flex: 1; white-space: pre-line; }
.softrepa-curves button { font: inherit; padding: 3px 10px; border: 1px solid var(--border-color, #555);
    border-radius: 4px; background: var(--comfy-menu-bg, #333); color: inherit; cursor: pointer; }
.softrepa-curves svg { flex: 1; width: 100%; min-height: 0; overflow: hidden; touch-action: none; cursor: crosshair; }
.softrepa-curves svg * { pointer-events: none; }
.softrepa-curves svg text { font-size: 11px; fill: var(--input-text, #ddd); }
.softrepa-curves svg .muted { fill: ${COLOURS.muted}; }
.softrepa-curves svg line { stroke: var(--border-color, #555); }
`

const percent = (share) => `${Math.round(100 * share)}%`
const plain = (number, digits = 3) => String(Number(number.toPrecision(digits)))
const gigabytes = (bytes) => (bytes / 1e9).toFixed(1)
const known = (value) => value !== null && value !== undefined

function duration(seconds) {
    const padded = (number) => String(Math.floor(number)).padStart(2, "0")
    return `${Math.floor(seconds / 3600)}:${padded((seconds / 60) % 60)}:${padded(seconds % 60)}`
}

function svg(name, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name)
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value)
    if (text !== undefined) element.textContent = text
    return element
}

function html(name, parent) {
    return parent.appendChild(document.createElement(name))
}

/** Loss and retrieval over the steps; `points` and `held_out` are [step, loss, retrieval], null where there is none. */
class Curves {
    constructor() {
        this.element = document.createElement("div")
        this.element.className = "softrepa-curves"
        const header = html("header", this.element)
        this.text = html("div", header)
        this.text.textContent = "Curves appear here while it trains."
        this.stop = html("button", header)
        this.stop.textContent = "Stop and keep"
        this.stop.title = "Ends the run after this step. What was learned is kept, and resume goes on from there."
        this.stop.hidden = true
        this.stop.addEventListener("click", () => this.interrupt())
        this.panels = [
            { title: "Loss", column: 1, shown: plain, svg: this.element.appendChild(svg("svg", {})) },
            { title: "Retrieval", column: 2, shown: percent, svg: this.element.appendChild(svg("svg", {})), whole: [0, 1] },
        ]
        for (const panel of this.panels) this.listen(panel.svg)
        new ResizeObserver(() => this.draw()).observe(this.element)
    }

    interrupt() {
        this.stop.disabled = true
        this.stop.textContent = "Stopping"
        api.interrupt(this.run.prompt)
    }

    /** All that is known of the run; each message holds it whole. */
    update(run) {
        if (run.prompt !== this.run?.prompt) this.zoom = null
        this.run = run
        if (run.ended) this.ended()
        else this.stop.hidden = false
        this.draw()
    }

    ended() {
        this.stop.hidden = true
        this.stop.disabled = false
        this.stop.textContent = "Stop and keep"
        if (this.run) this.run.ended = true
    }

    status() {
        const { step, steps, ended, seconds_left: left, memory } = this.run
        const parts = [`step ${step} of ${steps}`]
        if (ended) parts.push(step < steps ? "stopped" : "done")
        else if (known(left)) parts.push(`${duration(left)} left`)
        if (memory && !ended) parts.push(`${memory.device} ${gigabytes(memory.used)} of ${gigabytes(memory.total)} GB`)
        return parts.join(" · ")
    }

    /** Of the point under the pointer, or the newest. */
    reading() {
        const points = this.visible(this.run.points)
        if (!points.length) return ""
        const nearest = (best, one) => (Math.abs(one[0] - this.hover) < Math.abs(best[0] - this.hover) ? one : best)
        const point = known(this.hover) ? points.reduce(nearest) : points.at(-1)
        const before = this.run.held_out.filter(([step]) => step <= point[0]).at(-1)
        const said = this.panels
            .filter((panel) => known(point[panel.column]))
            .map((panel) => {
                const heldOut = before && !this.hides(panel) ? ` (held out ${panel.shown(before[panel.column])})` : ""
                return `${panel.title.toLowerCase()} ${panel.shown(point[panel.column])}${heldOut}`
            })
        return `step ${point[0]}: ${said.join(", ")}`
    }

    /** Held-out losses are the paper's: beside another loss they would mislead. */
    hides(panel) {
        return panel.column === 1 && !this.run.comparable
    }

    span() {
        return this.zoom ?? [this.run.points[0]?.[0] ?? 0, Math.max(this.run.step, 1)]
    }

    visible(points) {
        const [first, last] = this.span()
        return points.filter(([step]) => step >= first && step <= last)
    }

    draw() {
        if (!this.run) return
        this.text.textContent = `${this.status()}\n${this.reading()}`
        for (const panel of this.panels) this.drawPanel(panel)
    }

    /** Anew at every move of the pointer, so nothing in it takes part in a click. */
    drawPanel(panel) {
        const width = panel.svg.clientWidth - MARGIN.left - MARGIN.right
        const height = panel.svg.clientHeight - MARGIN.top - MARGIN.bottom
        panel.svg.replaceChildren()
        if (width < 20 || height < 10) return
        const pick = (points) =>
            this.visible(points)
                .filter((point) => known(point[panel.column]))
                .map((point) => [point[0], point[panel.column]])
        const batch = pick(this.run.points)
        const heldOut = this.hides(panel) ? [] : pick(this.run.held_out)
        const values = [...batch, ...heldOut].map(([, value]) => value)
        if (!values.length) return
        const [first, last] = this.span()
        let [low, high] = panel.whole ?? [Math.min(...values), Math.max(...values)]
        if (high === low) [low, high] = [low - 0.5, high + 0.5]
        const x = (step) => MARGIN.left + ((step - first) / (last - first || 1)) * width
        const y = (value) => MARGIN.top + (1 - (value - low) / (high - low)) * height
        // as many digits as tell the lines of the grid apart
        const most = Math.max(Math.abs(low), Math.abs(high))
        const digits = Math.min(6, Math.max(3, 2 + Math.ceil(Math.log10(most / (high - low)))))
        const add = (name, attributes, text) => panel.svg.appendChild(svg(name, attributes, text))
        const path = (points, stroke) =>
            add("polyline", {
                points: points.map(([step, value]) => `${x(step)},${y(value)}`).join(" "),
                ...{ stroke, fill: "none", "stroke-width": 1.8, "stroke-linejoin": "round" },
            })

        add("text", { x: MARGIN.left, y: 13 }, panel.title)
        for (const share of [0, 0.5, 1]) {
            const value = low + share * (high - low)
            add("line", { x1: MARGIN.left, x2: MARGIN.left + width, y1: y(value), y2: y(value) })
            const place = { x: MARGIN.left - 5, y: y(value) + 4, "text-anchor": "end", class: "muted" }
            add("text", place, panel.shown(value, digits))
        }
        const bottom = MARGIN.top + height + 14
        add("text", { x: MARGIN.left, y: bottom, class: "muted" }, String(Math.round(first)))
        add("text", { x: MARGIN.left + width, y: bottom, "text-anchor": "end", class: "muted" }, String(Math.round(last)))
        if (panel.column === 2) {
            const level = y(this.run.chance)
            add("line", { x1: MARGIN.left, x2: MARGIN.left + width, y1: level, y2: level, "stroke-dasharray": "4 4" })
            const said = `chance ${percent(this.run.chance)}`
            add("text", { x: MARGIN.left + width, y: 13, "text-anchor": "end", class: "muted" }, said)
        }
        path(batch, COLOURS.batch)
        path(heldOut, COLOURS.heldOut)
        for (const [step, value] of heldOut) add("circle", { cx: x(step), cy: y(value), r: 3, fill: COLOURS.heldOut })
        if (heldOut.length) {
            add("text", { x: MARGIN.left + 70, y: 13, style: `fill: ${COLOURS.batch}` }, "in the batch")
            add("text", { x: MARGIN.left + 150, y: 13, style: `fill: ${COLOURS.heldOut}` }, "held out")
        }
        if (known(this.hover)) {
            add("line", { x1: x(this.hover), x2: x(this.hover), y1: MARGIN.top, y2: MARGIN.top + height })
        }
        if (this.from !== undefined && known(this.hover)) {
            const [left, right] = [x(this.from), x(this.hover)].sort((one, other) => one - other)
            add("rect", { x: left, y: MARGIN.top, width: right - left, height, fill: COLOURS.batch, opacity: 0.2 })
        }
    }

    listen(target) {
        const step = (event) => {
            const box = target.getBoundingClientRect()
            const across = ((event.clientX - box.left) / box.width) * target.clientWidth
            const share = (across - MARGIN.left) / (target.clientWidth - MARGIN.left - MARGIN.right)
            const [first, last] = this.span()
            return first + Math.min(Math.max(share, 0), 1) * (last - first)
        }
        const on = (name, call) =>
            target.addEventListener(name, (event) => {
                if (!this.run) return
                event.stopPropagation() // neither the node nor the canvas moves
                call(event)
                this.draw()
            })
        on("pointermove", (event) => (this.hover = step(event)))
        on("pointerleave", () => (this.hover = this.from === undefined ? null : this.hover))
        on("pointerdown", (event) => {
            target.setPointerCapture(event.pointerId)
            this.from = step(event)
        })
        on("pointerup", (event) => {
            const ends = [this.from, step(event)].sort((one, other) => one - other)
            this.from = undefined
            if (ends[1] - ends[0] >= 1 && this.run.points.filter(([at]) => at >= ends[0] && at <= ends[1]).length > 1)
                this.zoom = ends
        })
        on("dblclick", () => (this.zoom = null))
    }
}

/** The node of an execution id, which is "5:3" for node 3 in subgraph node 5. */
function nodeOf(id) {
    let graph = app.rootGraph ?? app.graph
    let node
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById(part)
        graph = node?.subgraph
    }
    return node
}

const all = new Set()

app.registerExtension({
    name: "SoftREPA.LiveCurves",
    setup() {
        html("style", document.head).textContent = STYLE
        api.addEventListener("softrepa.training", ({ detail }) => nodeOf(detail.node)?.softrepaCurves?.update(detail))
        for (const name of ["execution_success", "execution_error", "execution_interrupted"])
            api.addEventListener(name, ({ detail }) => {
                for (const curves of all) if (curves.run?.prompt === detail?.prompt_id) curves.ended()
            })
    },
    nodeCreated(node) {
        if (node.comfyClass !== NODE) return
        const curves = (node.softrepaCurves = new Curves())
        all.add(curves)
        const removed = node.onRemoved
        node.onRemoved = function () {
            all.delete(curves)
            return removed?.apply(this, arguments)
        }
        const widget = node.addDOMWidget("curves", "softrepa_curves", curves.element, {
            serialize: false,
            hideOnZoom: false,
            getMinHeight: () => HEIGHT,
        })
        widget.serialize = false // not among the values of a saved graph either
        if (node.size[0] < WIDTH) node.setSize([WIDTH, node.size[1]])
    },
})
