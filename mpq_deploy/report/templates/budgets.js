
// What asks for a slider or a pointer is shown from here on.
document.documentElement.classList.add("scripted");

// Budgets: the slider picks a plan; the point on the curve, the figures and the strip of layers follow at once.
(() => {
  const box = document.getElementById("budget-box");
  if (!box) return;
  const plans = JSON.parse(document.getElementById("budget-plans").textContent);
  const slider = document.getElementById("budget");
  const cursor = document.getElementById("budget-cursor");
  const strip = document.getElementById("budget-strip");
  const option = document.getElementById("budget-option");
  const shares = [...document.querySelectorAll("#budget-shares li")];
  const text = (id, value) => {
    document.getElementById(id).textContent = value;
  };
  const blocks = plans.layers.map(() => document.createElement("span"));
  strip.append(...blocks);
  strip.classList.toggle("dense", blocks.length > 150);

  const show = () => {
    const stop = plans.stops[Number(slider.value)];
    text("budget-ratio", stop.ratio);
    text("budget-size", `${stop.size}, ${stop.ratio} of FP16`);
    text("budget-loss", stop.loss || "not predicted");
    text("budget-changed", stop.own ? "this run's plan" : stop.changed || `${blocks.length} layers`);
    if (option) option.textContent = stop.budget;
    slider.setAttribute("aria-valuetext", `${stop.ratio} of FP16, ${stop.loss ? `predicted error ${stop.loss}` : "error not predicted"}`);
    blocks.forEach((block, layer) => {
      const scheme = stop.plan[layer];
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
    if (!cursor) return;

    cursor.toggleAttribute("hidden", stop.at === null);
    if (stop.at === null) return;
    cursor.querySelector("path").setAttribute("transform", `translate(${stop.at[0]} 0)`);
    cursor.querySelector("circle").setAttribute("transform", `translate(${stop.at[0]} ${stop.at[1]})`);
  };
  slider.addEventListener("input", show);
  document.getElementById("budget-own").addEventListener("click", () => {
    slider.value = box.dataset.start;
    show();
    slider.focus();
  });
  box.hidden = false;
  show();
})();
