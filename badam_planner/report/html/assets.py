"""The style sheet and the script of the HTML report, as text: the report is one file and loads nothing."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --dim: #57606a; --line: #d0d7de; --raised: #f4f6f8;
  --pass: #00664a; --fail: #a33b00; --link: #0a58a8;
}
@media (prefers-color-scheme: dark) {
  :root:not([data-printing]) {
    --paper: #14171c; --ink: #e6e9ee; --dim: #a5adb8; --line: #343b45; --raised: #1d2229;
    --pass: #4cc9a0; --fail: #ff9e66; --link: #7db7f5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem clamp(0.75rem, 3vw, 2rem) 3rem; max-width: 72rem;
  background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.25rem; overflow-wrap: anywhere; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible, [tabindex]:focus-visible {
  outline: 3px solid var(--link); outline-offset: 2px;
}
.skip { position: absolute; left: -100rem; }
.skip:focus { position: static; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; padding: 0; list-style: none; }
.verdict { border-left: 0.4rem solid; padding: 0.5rem 0.75rem; background: var(--raised); font-weight: 600; }
.verdict.pass { border-color: var(--pass); } .verdict.pass strong { color: var(--pass); }
.verdict.fail { border-color: var(--fail); } .verdict.fail strong { color: var(--fail); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; margin: 1rem 0; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption { color: var(--dim); margin-bottom: 0.5rem; max-width: 46rem; overflow-wrap: anywhere; }
.chart { width: 100%; }
details { margin: 0.5rem 0; } summary { cursor: pointer; color: var(--link); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
caption { text-align: left; color: var(--dim); padding: 0.25rem 0; }
th, td { padding: 0.2rem 1rem 0.2rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--dim); font-weight: 600; }
tbody th { font-weight: 400; }
footer { margin-top: 3rem; color: var(--dim); font-size: 0.85rem; overflow-wrap: anywhere; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.4rem; } }
@media print {
  .chart { height: auto !important; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .skip, details:not([open]), .modebar-container { display: none !important; }
  section { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""

SCRIPT = """
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  // Named one by one: a button that a later plotly adds may want to send the chart somewhere.
  const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  const paperWidth = 680;
  let printing = false;

  function colours() {
    const style = getComputedStyle(root);
    const read = (name) => style.getPropertyValue(name).trim();
    return {ink: read("--ink"), dim: read("--dim"), line: read("--line"), raised: read("--raised")};
  }

  // Words below an axis stay level, so that they never reach into its title: where there is no room for all, some are
  // left out, and where words stand in a row they are set one below the other.
  function fitTicks(axis, room) {
    const widest = 8 * Math.max(...axis.ticktext.map((text) => text.length)) + 8;
    const step = Math.ceil(widest * axis.ticktext.length / Math.max(room, 1));
    axis.tickangle = 0;
    axis.tickvals = axis.tickvals.filter((_, index) => index % step === 0);
    axis.ticktext = axis.ticktext.filter((_, index) => index % step === 0);
  }

  function breakWords(traces, layout) {
    const words = traces[0].x.map(String);
    layout.xaxis = Object.assign(layout.xaxis, {
      tickangle: 0, tickvals: traces[0].x, ticktext: words.map((text) => text.replaceAll(" ", "<br>")),
    });
  }

  // The figures name no colour of text or background; both follow the page, so they follow light, dark and print.
  function themed(figure, colour, width) {
    const copy = structuredClone(figure);
    const axis = {gridcolor: colour.line, zerolinecolor: colour.line, linecolor: colour.dim, automargin: true};
    const layout = Object.assign({
      height: figure.height, autosize: true, margin: {l: 56, r: 12, t: 36, b: 48},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      // At the bottom of the figure, where plotly keeps room for it below the axis and its title.
      legend: {orientation: "h", x: 0, yref: "container", y: 0, yanchor: "bottom", traceorder: "normal"},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: colour.dim, activecolor: colour.ink},
      hoverlabel: {align: "left", bgcolor: colour.raised, bordercolor: colour.dim, font: {color: colour.ink}},
    }, copy.layout);
    layout.font = {color: colour.ink, size: 13, family: "system-ui, sans-serif"};
    for (const name of new Set(["xaxis", "yaxis", ...Object.keys(layout).filter((key) => /^[xy]axis/.test(key))])) {
      layout[name] = Object.assign({}, axis, layout[name]);
      if (layout[name].title) layout[name].title.standoff = 8;
    }
    if (layout.xaxis.ticktext) fitTicks(layout.xaxis, width - 100);
    else if (copy.traces[0].type === "bar" && copy.traces[0].orientation !== "h") breakWords(copy.traces, layout);
    for (const shape of layout.shapes || []) {
      if (shape.type === "line") shape.line.color = colour.ink;
    }
    for (const note of layout.annotations || []) {
      Object.assign(note, {arrowcolor: colour.ink, bgcolor: colour.raised, borderpad: 3});
    }
    for (const trace of copy.traces) {
      if (trace.meta === "ink") trace.line.color = colour.ink;
      if (trace.meta === "thin") continue;
      if (trace.type === "bar" || (trace.marker && trace.marker.size >= 9)) {
        trace.marker.line = {width: 1, color: colour.ink};
      }
    }
    if (printing) Object.assign(layout, {width: paperWidth, height: Math.round(figure.height * 0.75), autosize: false});
    return [copy.traces, layout];
  }

  const places = new Map(figures.map((figure) => [document.getElementById("plot-" + figure.identity), figure]));

  async function draw(place) {
    const config = {responsive: !printing, displaylogo: false, modeBarButtons: buttons};
    const [traces, layout] = themed(places.get(place), colours(), printing ? paperWidth : place.clientWidth);
    await Plotly.react(place, traces, layout, config);
    place.dataset.drawn = "";
  }

  // What is on paper is drawn whole; of the screen, what was in sight once.
  function drawAll() {
    return Promise.all([...places.keys()].filter((place) => printing || "drawn" in place.dataset).map(draw));
  }

  // A chart is drawn a screen before it comes into sight. The first call tells of all: it sees what is in sight now.
  function drawWhenSeen() {
    return new Promise((done, failed) => {
      const observer = new IntersectionObserver((entries) => {
        const seen = entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target);
        seen.forEach((place) => observer.unobserve(place));
        Promise.all(seen.filter((place) => !("drawn" in place.dataset)).map(draw)).then(done, failed);
      }, {rootMargin: "100% 0px"});
      for (const place of places.keys()) observer.observe(place);
      if (!places.size) done();
    });
  }

  // Paper is light and has one width; the mark on the root element tells the style sheet the same.
  function print(begins) {
    printing = begins;
    root.toggleAttribute("data-printing", begins);
    return drawAll();
  }

  // Every browser since 2023 can unpack; an older one shows the tables instead.
  async function load() {
    const packed = atob(document.getElementById("library").textContent);
    const bytes = new Uint8Array(packed.length);
    for (let index = 0; index < packed.length; index++) bytes[index] = packed.charCodeAt(index);
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(unpacked).text();
    document.head.append(script);
    await drawWhenSeen();
  }

  load().then(() => {
    root.dataset.charts = String(figures.length);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawAll(); });
    addEventListener("beforeprint", () => { print(true); });
    addEventListener("afterprint", () => { print(false); });
  }).catch((error) => {
    console.error(error);
    root.dataset.charts = "none";
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
  for (const link of document.querySelectorAll("nav a")) {
    link.addEventListener("click", () => {
      const heading = document.querySelector(link.getAttribute("href") + " h2");
      if (heading) { heading.tabIndex = -1; heading.focus({preventScroll: true}); }
    });
  }
})();
"""
