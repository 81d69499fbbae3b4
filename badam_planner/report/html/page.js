// Draws the charts of a report: unpacks plotly.js, gives the figures the page's colours, follows screen and paper.
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
