
// Draws the figures that the page carries, one after the other, so that it can be scrolled meanwhile.
(async () => {
  const text = (id) => document.getElementById(id).textContent;
  const page = document.documentElement.dataset;

  function hiddenRuns() {
    return new Set([...document.querySelectorAll('[data-run][aria-pressed="false"]')].map((b) => b.dataset.run));
  }

  async function draw(figures) {
    const hidden = hiddenRuns();
    for (const [key, figure] of Object.entries(figures)) {
      await plots.react(document.getElementById(`plot-${key}`), figure, hidden);
      await new Promise((next) => setTimeout(next));
    }
  }

  try {
    plots.run(await plots.unpack(text("plotly")));
    const figures = JSON.parse(await plots.unpack(text("figures")));
    await draw(figures);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(figures));
    for (const chip of document.querySelectorAll("[data-run]")) {
      chip.addEventListener("click", () => {
        chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
        draw(figures);
      });
    }
    page.plots = "drawn";
  } catch (error) {
    const failure = document.getElementById("failure");
    failure.textContent = `The plots could not be drawn: ${error.message}.`;
    failure.hidden = false;
    page.plots = "failed";
  }
})();
