"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  // A finger that moves over a chart scrolls the page; a mouse zooms.
  const isTouch = matchMedia("(pointer: coarse)").matches;
  const options = { displayModeBar: false, responsive: true };
  const PRINTED_WIDTH = 330; // two charts beside each other on A4

  function draw(plot) {
    if (plot.dataset.drawn) return;
    plot.dataset.drawn = "yes";
    const { data, layout } = charts[plot.dataset.chart];
    if (isTouch) layout.dragmode = false;
    Plotly.newPlot(plot, data, layout, options);
  }

  // What is seen is drawn first, the rest while nothing else is to be done.
  const seen = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "300px" },
  );
  plots.forEach((plot) => seen.observe(plot));
  const idle = window.requestIdleCallback || ((work) => setTimeout(work, 30));
  const waiting = [...plots];
  function drawNext() {
    if (!waiting.length) {
      document.body.dataset.ready = "yes";
      return;
    }
    draw(waiting.shift());
    idle(drawNext);
  }
  idle(drawNext);

  document.querySelectorAll(".arms input").forEach((box) => {
    box.addEventListener("change", () => {
      const arm = Number(box.dataset.arm);
      for (const plot of box.closest("section").querySelectorAll(".plot")) {
        const { data } = charts[plot.dataset.chart];
        const own = data.flatMap((trace, number) => (trace.meta === arm ? [number] : []));
        for (const number of own) data[number].visible = box.checked;
        if (own.length && plot.dataset.drawn) Plotly.restyle(plot, { visible: box.checked }, own);
      }
    });
    box.checked = true; // A browser that goes back to the page remembers boxes, and not what they did.
  });

  document.querySelectorAll("button[data-copies]").forEach((button) => {
    button.addEventListener("click", async () => {
      const source = document.getElementById(button.dataset.copies);
      try {
        await navigator.clipboard.writeText(source.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(source);
        button.textContent = "Selected: copy it with the keyboard";
      }
    });
  });

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.run:not([open])")];
    opened.forEach((details) => { details.open = true; });
    plots.forEach(draw);
    plots.forEach((plot) => Plotly.relayout(plot, { width: PRINTED_WIDTH }));
  });
  addEventListener("afterprint", () => {
    opened.forEach((details) => { details.open = false; });
    plots.forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true }));
  });
})();
