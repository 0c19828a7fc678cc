"use strict";

// Drawing, shared by the report and the live page.
const plots = (() => {
  // A finger that drags wants to scroll the page, a mouse that drags wants to zoom the plot.
  const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
  const config = { responsive: true, displayModeBar: false, displaylogo: false };

  // The page packs script and data (gzip, base64) to keep the file small.
  async function unpack(text) {
    if (!("DecompressionStream" in window)) throw new Error("this browser is too old; any from 2023 on will do");
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  // Runs a script whose checksum the page's policy names.
  function run(text) {
    const script = document.createElement("script");
    script.textContent = text;
    document.head.append(script);
  }

  // Figures name colours by style-sheet variable, so that the style sheet alone knows light from dark.
  const plain = (value) => value === null || typeof value === "number";
  function themed(figure) {
    const style = getComputedStyle(document.documentElement);
    const walk = (value, key) => {
      if (typeof value === "string")
        return key !== "meta" && value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
      if (value === null || typeof value !== "object") return value;
      if (Array.isArray(value)) return value.every(plain) ? value : value.map((item) => walk(item, key));
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, walk(item, name)]));
    };
    return walk(figure, "");
  }

  // Draws {traces, layout} into an element, or draws it anew; traces of hidden runs do not show.
  function react(element, figure, hidden = new Set()) {
    const { traces, layout } = themed(figure);
    for (const trace of traces) trace.visible = !hidden.has(trace.run);
    return Plotly.react(element, traces, { ...layout, dragmode, uirevision: "kept" }, config);
  }

  return { unpack, run, react };
})();
