"use strict";

// Draws the figures that the page carries. Script and data are packed (gzip, base64) to keep the file small.
(async () => {
  // A finger that drags wants to scroll the page, a mouse that drags wants to zoom the plot.
  const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
  const config = { responsive: true, displayModeBar: false, displaylogo: false };

  async function unpack(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  // Figures name colours by style-sheet variable, so that the style sheet alone knows light from dark.
  function themed(text) {
    const style = getComputedStyle(document.documentElement);
    return JSON.parse(text, (key, value) =>
      key !== "meta" && typeof value === "string" && value.startsWith("var(--")
        ? style.getPropertyValue(value.slice(4, -1)).trim()
        : value);
  }

  function hiddenRuns() {
    return new Set([...document.querySelectorAll('[data-run][aria-pressed="false"]')].map((b) => b.dataset.run));
  }

  async function draw(text) {
    const hidden = hiddenRuns();
    for (const [key, figure] of Object.entries(themed(text))) {
      for (const trace of figure.traces) trace.visible = !hidden.has(trace.legendgroup);
      await Plotly.react(document.getElementById(`plot-${key}`), figure.traces, { ...figure.layout, dragmode }, config);
    }
  }

  try {
    if (!("DecompressionStream" in window)) throw new Error("this browser is too old; any from 2023 on will do");
    const plotly = document.createElement("script");
    plotly.textContent = await unpack("plotly");
    document.head.append(plotly);
    const figures = await unpack("figures");
    await draw(figures);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(figures));
    for (const chip of document.querySelectorAll("[data-run]")) {
      chip.addEventListener("click", () => {
        chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
        draw(figures);
      });
    }
    document.documentElement.dataset.plots = "drawn";
  } catch (error) {
    const failure = document.getElementById("failure");
    failure.textContent = `The plots could not be drawn: ${error.message}.`;
    failure.hidden = false;
    document.documentElement.dataset.plots = "failed";
  }
})();
