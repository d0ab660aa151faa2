"use strict";
// Rows can be switched off everywhere at once, by their box or by a legend; samples follow the
// slider. Figures are drawn when they come into view, and all of them before printing.
(() => {
  const { panels, strips } = JSON.parse(document.getElementById("data").textContent);
  const off = new Set();
  const boxes = [...document.querySelectorAll("[data-toggle]")];
  const nameOf = new Map(boxes.map((box) => [box.dataset.toggle, box.closest("label").textContent.trim()]));
  const idOf = new Map([...nameOf].map(([id, name]) => [name, id]));
  const config = {
    displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"],
    toImageButtonOptions: { format: "svg" },
  };

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  function theme(layout) {
    const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--soft") };
    return {
      ...layout, paper_bgcolor: colour("--paper"), plot_bgcolor: colour("--paper"),
      font: { color: colour("--ink"), family: "system-ui, sans-serif", size: 12 },
      xaxis: { ...layout.xaxis, ...axis }, yaxis: { ...layout.yaxis, ...axis },
      hoverlabel: { bgcolor: colour("--panel"), font: { color: colour("--ink") } },
    };
  }
  const visible = (trace) => (off.has(idOf.get(trace.meta)) ? "legendonly" : true);

  function draw(place) {
    if (place.dataset.drawn) return;
    place.dataset.drawn = "yes";
    const { data, layout } = panels[place.id];
    data.forEach((trace) => { trace.visible = visible(trace); });
    Plotly.newPlot(place, data, theme(layout), config);
    place.on("plotly_legendclick", (event) => {
      const id = idOf.get(event.data[event.curveNumber].meta);
      show(id, off.has(id));
      return false;
    });
    place.on("plotly_legenddoubleclick", () => false);
  }
  const drawn = () => Object.keys(panels).map((id) => document.getElementById(id)).filter((p) => p.dataset.drawn);

  function show(id, on) {
    if (on) off.delete(id); else off.add(id);
    boxes.find((box) => box.dataset.toggle === id).checked = on;
    document.querySelectorAll(`[data-arm="${id}"]`).forEach(hideOrShow);
    for (const place of drawn()) Plotly.restyle(place, { visible: place.data.map(visible) });
  }
  const hiddenNfe = new Set();
  function hideOrShow(element) {
    element.hidden = off.has(element.dataset.arm) || hiddenNfe.has(element.dataset.nfe);
  }
  boxes.forEach((box) => box.addEventListener("change", () => show(box.dataset.toggle, box.checked)));
  document.querySelectorAll("[data-show-nfe]").forEach((box) => box.addEventListener("change", () => {
    const nfe = box.dataset.showNfe;
    if (box.checked) hiddenNfe.delete(nfe); else hiddenNfe.add(nfe);
    document.querySelectorAll(`[data-nfe="${nfe}"]`).forEach(hideOrShow);
  }));

  // Each row shows its newest samples at or before the chosen step.
  document.querySelectorAll("input.steps").forEach((slider) => slider.addEventListener("input", () => {
    const step = Number(slider.dataset.steps.split(" ")[slider.value]);
    slider.nextElementSibling.value = step;
    for (const [id, pictures] of Object.entries(strips)) {
      if (!id.startsWith(`strip-${slider.dataset.section}-`)) continue;
      const kept = Object.keys(pictures).map(Number).sort((a, b) => a - b);
      const newest = kept.filter((other) => other <= step).pop() ?? kept[0];
      const image = document.getElementById(id);
      image.src = pictures[newest];
      image.alt = image.alt.replace(/step \d+/, `step ${newest}`);
      document.querySelector(`[data-step-of="${id}"]`).textContent = newest;
    }
  }));

  const watch = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (entry.isIntersecting) { watch.unobserve(entry.target); draw(entry.target); }
  }), { rootMargin: "400px" });
  for (const id of Object.keys(panels)) watch.observe(document.getElementById(id));
  window.addEventListener("beforeprint", () => Object.keys(panels).forEach((id) => draw(document.getElementById(id))));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const place of drawn()) Plotly.relayout(place, theme(place.layout));
  });
})();
