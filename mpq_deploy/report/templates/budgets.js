
// What asks for a slider or a pointer is shown from here on.
document.documentElement.classList.add("scripted");

// Budgets: the sliders set the largest size and the longest call; the best plan within both, its point on the chart,
// the figures and the strip of layers follow at once.
(() => {
  const box = document.getElementById("budget-box");
  if (!box) return;
  const plans = JSON.parse(document.getElementById("budget-plans").textContent);
  const byId = (id) => document.getElementById(id);
  const [budget, time, cursor, strip, options] = ["budget", "time", "budget-cursor", "budget-strip", "budget-options"].map(byId);
  const shares = [...document.querySelectorAll("#budget-shares li")];
  const own = plans.stops.find((stop) => stop.own);
  const text = (id, value) => {
    if (byId(id)) byId(id).textContent = value;
  };
  const blocks = plans.layers.map(() => document.createElement("span"));
  strip.append(...blocks);
  strip.classList.toggle("dense", blocks.length > 150);

  // The minimum predicted error; where none is predicted, the largest plan. Stops are sorted by size.
  const better = (one, other) => (one.error === null ? one.bytes > other.bytes : one.error < other.error);
  const best = (stops) => stops.reduce((chosen, stop) => (chosen && !better(stop, chosen) ? chosen : stop), null);

  const showLayers = (stop) => {
    blocks.forEach((block, layer) => {
      const scheme = stop.plan.charCodeAt(layer) - "A".charCodeAt(0);
      block.className = `scheme-${plans.families[scheme]}${plans.schemes[scheme].includes("+") ? " branched" : ""}`;
      block.style.flexGrow = String(plans.bytes[layer][scheme]);
      block.title = `${plans.layers[layer]}: ${plans.schemes[scheme]}`;
    });
    shares.forEach((item, number) => {
      const [layers, share] = stop.shares[number];
      item.classList.toggle("none", layers === 0);
      item.querySelector("[data-share]").textContent = layers ? `${layers} ${layers === 1 ? "layer" : "layers"}, ${share}` : "none";
    });
    const named = shares.map((item) => item.textContent.trim().replace(/\s+/g, " ")).join("; ");
    strip.setAttribute("aria-label", `The layers in graph order, coloured by scheme: ${named}`);
  };
  const showPoint = (at) => {
    if (!cursor) return;
    cursor.toggleAttribute("hidden", at === null);
    if (at === null) return;
    const [x, y] = at;
    const circle = cursor.querySelector("circle");
    cursor.querySelector("path").setAttribute("transform", `translate(${x} 0)`);
    circle.toggleAttribute("hidden", y === null);
    circle.setAttribute("transform", `translate(${x} ${y ?? 0})`);
  };
  const showPlan = (stop) => {
    text("budget-size", stop.size);
    text("budget-share", `${stop.ratio} of FP16`);
    text("budget-loss", stop.loss || "not predicted");
    text("budget-time", stop.time);
    text("budget-changed", stop.own ? "this run's plan" : stop.changed || `${blocks.length} layers`);
    if (options) options.textContent = stop.options;
    showLayers(stop);
    showPoint(stop.at);
  };
  const showNone = (small, limit) => {
    const fastest = Math.min(...small.map((stop) => stop.ms));
    const next = small.find((stop) => stop.ms === fastest);
    text("budget-none", `None of these plans is that small and that fast: within this budget the fastest takes ${next.time}, not ${limit}.`);
    showPoint(null);
  };

  const show = (back) => {
    const [bytes, share] = plans.budgets[Number(budget.value)];
    const [ms, limit] = (time && plans.times[Number(time.value)]) ?? [Infinity, "no limit"];
    const small = plans.stops.filter((stop) => stop.bytes <= bytes);
    const stop = back ? own : best(small.filter((one) => ms === Infinity || one.ms <= ms));
    text("budget-ratio", `up to ${share}`);
    text("time-limit", ms === Infinity ? limit : `up to ${limit}`);
    byId("budget-said").hidden = byId("budget-plan").hidden = !stop;
    byId("budget-none").hidden = Boolean(stop);
    if (stop) showPlan(stop);
    else showNone(small, limit);
    const said = stop ? `${stop.ratio} of FP16, ${stop.loss ? `${plans.predicted.toLowerCase()} ${stop.loss}` : "error not predicted"}` : "no plan";
    const shown = time && stop ? `${said}, ${stop.time}` : said;
    budget.setAttribute("aria-valuetext", `up to ${share} of FP16: ${shown}`);
    if (time) time.setAttribute("aria-valuetext", `${ms === Infinity ? limit : `up to ${limit}`}: ${shown}`);
  };
  for (const slider of [budget, time]) slider?.addEventListener("input", () => show(false));
  byId("budget-own").addEventListener("click", () => {
    budget.value = box.dataset.start;
    if (time) time.value = box.dataset.startTime;
    show(true);
    budget.focus();
  });
  box.hidden = false;
  show(Boolean(own));
})();
