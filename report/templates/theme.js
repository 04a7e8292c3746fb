// Plots take the colours of the page, in light and in dark.
(function () {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  function paint() {
    const colour = getComputedStyle(document.documentElement).getPropertyValue("--text").trim();
    document.querySelectorAll(".js-plotly-plot").forEach(function (plot) {
      Plotly.relayout(plot, { "font.color": colour });
    });
  }
  dark.addEventListener("change", paint);
  window.addEventListener("load", paint);
})();
