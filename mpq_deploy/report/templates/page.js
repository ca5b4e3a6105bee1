"use strict";

// What asks for a slider or a pointer is shown from here on.
document.documentElement.classList.add("scripted");

// Pictures: lay the original over every variant, either as it is or as a difference with a gain.
(() => {
  const table = document.getElementById("pictures");
  const modes = document.getElementById("image-modes");
  if (!table || !modes) return;
  const gain = document.getElementById("gain");
  const gainValue = document.getElementById("gain-value");
  const hint = document.getElementById("image-hint");
  const hints = {
    images: "",
    original: "Every row shows the original: switch back and forth to see what changes.",
    difference: "Absolute difference to the original, pixel by pixel. Black: no difference.",
  };
  modes.hidden = false;

  // The original's data is in the page once: its copies are made only when they are asked for.
  const addOriginals = () => {
    if (table.querySelector(".over")) return;
    const originals = [...table.querySelectorAll('tr[data-variant="float"] img')];
    for (const row of table.querySelectorAll('tbody tr:not([data-variant="float"])')) {
      row.querySelectorAll(".picture").forEach((cell, column) => {
        const copy = new Image();
        copy.src = originals[column].src;
        copy.alt = "";
        copy.className = "over";
        cell.append(copy);
      });
    }
  };
  const show = () => {
    const mode = modes.querySelector("input[type=radio]:checked").value;
    if (mode !== "images") addOriginals();
    table.dataset.mode = mode;
    gain.disabled = mode !== "difference";
    const factor = 2 ** Number(gain.value);
    gainValue.value = String(factor);
    gain.setAttribute("aria-valuetext", `${factor} times`);
    table.style.setProperty("--gain", String(factor));
    table.dispatchEvent(new CustomEvent("gain", { detail: factor }));
    hint.textContent = mode === "difference" ? `${hints[mode]} Amplified ${factor} times.` : hints[mode];
  };
  modes.addEventListener("input", show);
  show();
})();

// One sample, enlarged: a slider wipes between the original and a variant; their difference stands beside it.
(() => {
  const viewer = document.getElementById("viewer");
  const table = document.getElementById("pictures");
  if (!viewer || !table) return;
  const [sample, variant, wipe] = ["viewer-sample", "viewer-variant", "wipe"].map((id) => document.getElementById(id));
  const [wiped, difference] = ["wipe-picture", "difference-picture"].map((id) => document.getElementById(id));
  const shownGain = document.getElementById("difference-gain");
  const said = document.getElementById("wipe-said");
  const picturesOf = (key) => [...table.querySelectorAll("tbody tr")].find((row) => row.dataset.variant === key)?.querySelectorAll("td .picture img:first-child") ?? [];
  const originals = picturesOf("float");
  if (variant.options.length === 0 || originals.length === 0) return;
  const copy = (image, over) => {
    const made = new Image(image.width, image.height);
    made.src = image.src;
    made.alt = over ? "" : image.alt;
    made.className = over ? "over" : "";
    return made;
  };
  const move = () => {
    const share = Number(wipe.value);
    wiped.style.setProperty("--wipe", `${share}%`);
    wipe.setAttribute("aria-valuetext", `${share} % original, ${100 - share} % ${variant.selectedOptions[0].textContent}`);
  };
  const show = () => {
    const at = Number(sample.value);
    const [original, other] = [originals[at], picturesOf(variant.value)[at]];
    wiped.replaceChildren(copy(other, false), copy(original, true));
    difference.replaceChildren(copy(other, false), copy(original, true));
    difference.firstChild.alt = `Difference between the original and ${other.alt}`;
    document.getElementById("wipe-title").textContent = variant.selectedOptions[0].textContent;
    said.textContent = `Left of the line the original, right of it ${variant.selectedOptions[0].textContent}`;
    move();
  };
  const amplify = (factor) => {
    difference.style.setProperty("--gain", String(factor));
    shownGain.textContent = String(factor);
  };
  table.addEventListener("gain", (event) => amplify(event.detail));
  table.addEventListener("click", (event) => {
    const cell = event.target.closest("td");
    const row = cell?.closest("tr");
    if (!cell?.querySelector(".picture") || !row.dataset.variant) return;
    sample.value = String([...row.querySelectorAll("td")].indexOf(cell));
    if (row.dataset.variant !== "float") variant.value = row.dataset.variant;
    show();
    viewer.scrollIntoView({ block: "nearest" });
  });
  for (const choice of [sample, variant]) choice.addEventListener("input", show);
  wipe.addEventListener("input", move);
  amplify(2 ** Number(document.getElementById("gain").value));
  viewer.hidden = false;
  show();
})();

// Layers: one tab stop, arrow keys move through the network, the panel tells about the current layer.
(() => {
  const group = document.getElementById("layers");
  const panel = document.getElementById("layer-panel");
  if (!group || !panel) return;
  const details = JSON.parse(document.getElementById("layer-details").textContent);
  const blocks = [...group.querySelectorAll(".block")];
  if (blocks.length === 0) return;
  let current = blocks[0];

  const element = (name, text) => {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  };
  const timesteps = JSON.parse(panel.dataset.timesteps);
  const power = (value) => {
    const [mantissa, exponent] = value.toExponential(1).split("e");
    return `${mantissa} × 10${[...exponent.replace("+", "")].map((sign) => (sign === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(sign)])).join("")}`;
  };
  // Bars on a logarithmic axis of three decades below the largest.
  const overTime = (steps) => {
    const list = document.createElement("div");
    list.className = "steps";
    list.setAttribute("role", "img");
    const largest = Math.max(...steps);
    const at = steps.indexOf(largest);
    steps.forEach((loss, number) => {
      const bar = document.createElement("span");
      const height = loss > 0 && largest > 0 ? Math.max(1 + Math.log10(loss / largest) / 3, 0.04) : 0.02;
      bar.style.height = `${100 * height}%`;
      bar.title = `timestep ${timesteps[number]}: ${power(loss)}`;
      list.append(bar);
    });
    const said = largest > 0 ? `largest at timestep ${timesteps[at]}: ${power(largest)}` : "none";
    list.setAttribute("aria-label", `From timestep ${timesteps[0]} to ${timesteps[timesteps.length - 1]}, ${said}`);
    const figure = document.createElement("figure");
    figure.append(list, element("figcaption", `Timestep ${timesteps[0]} (noise) to ${timesteps[timesteps.length - 1]} (image); ${said}. Logarithmic.`));
    return figure;
  };
  const tell = (block) => {
    current.removeAttribute("aria-current");
    current.tabIndex = -1;
    current = block;
    current.setAttribute("aria-current", "true");
    current.tabIndex = 0;
    const layer = details[Number(block.dataset.layer)];
    const facts = document.createElement("dl");
    facts.className = "facts";
    for (const [term, value] of layer.facts) {
      const pair = document.createElement("div");
      pair.append(element("dt", term), element("dd", value));
      facts.append(pair);
    }
    panel.replaceChildren(element("h4", layer.name), facts);
    if (layer.steps.length > 1) panel.append(element("p", "Predicted error over timesteps:"), overTime(layer.steps));
    if (layer.why.length > 0) {
      const reasons = document.createElement("ul");
      for (const reason of layer.why) reasons.append(element("li", reason));
      panel.append(element("p", "Why this scheme:"), reasons);
    }
    if (layer.refused.length > 0) {
      const list = document.createElement("ul");
      for (const [scheme, reason] of layer.refused) list.append(element("li", `${scheme}: ${reason}`));
      panel.append(element("p", "Schemes that it may not take:"), list);
    }
  };
  const blockOf = (event) => event.target.closest(".block");
  for (const name of ["pointerover", "focusin", "click"]) {
    group.addEventListener(name, (event) => {
      const block = blockOf(event);
      if (block) tell(block);
    });
  }
  group.addEventListener("keydown", (event) => {
    const at = blocks.indexOf(current);
    const moves = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: blocks.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    blocks[Math.min(Math.max(moves[event.key], 0), blocks.length - 1)].focus();
  });
  panel.hidden = false;
  tell(blocks.reduce((widest, block) => (parseFloat(block.style.getPropertyValue("--share")) > parseFloat(widest.style.getPropertyValue("--share")) ? block : widest)));
})();

// Orthogonality: one matrix large, its timestep by the slider, two layers by pointer or arrow keys. The values are read
// back from the picture's colours.
(() => {
  const box = document.getElementById("orm-large");
  if (!box) return;
  const map = document.getElementById("orm-map");
  const slider = document.getElementById("orm-step");
  const shown = document.getElementById("orm-timestep");
  const cell = document.getElementById("orm-cell");
  const small = [...document.querySelectorAll(".orm-maps img")];
  const details = JSON.parse(document.getElementById("layer-details").textContent);
  const palette = JSON.parse(document.getElementById("orm-palette").textContent);
  const levels = new Map(palette.map((colour, level) => [colour, level]));
  const [low, pooled, layers] = ["low", "pooled", "layers"].map((name) => Number(box.dataset[name]));
  const side = Math.ceil(layers / pooled);
  const pixels = document.getElementById("orm-image").getContext("2d", { willReadFrequently: true });
  let at = [0, 0];

  const layersAt = (point) => {
    const first = point * pooled;
    const last = Math.min(first + pooled, layers) - 1;
    const names = details[first].name + (last > first ? ` to ${details[last].name}` : "");
    return { first, last, names };
  };
  const tell = () => {
    const [across, down] = at.map(layersAt);
    const colour = [...pixels.getImageData(at[0], at[1], 1, 1).data.slice(0, 3)].join(",");
    const level = levels.get(colour);
    const value = level === undefined ? "" : `: ${(low + ((1 - low) * level) / (palette.length - 1)).toFixed(2)}`;
    cell.textContent = `${down.names} and ${across.names}${value}`;
    map.querySelector(".down").style.left = `${((at[0] + 0.5) / side) * 100}%`;
    map.querySelector(".across").style.top = `${((at[1] + 0.5) / side) * 100}%`;
    for (const line of document.querySelectorAll("#orthogonality .trace")) {
      const layer = Number(line.dataset.layer);
      const picked = [across, down].some((part) => layer >= part.first && layer <= part.last);
      line.classList.toggle("picked", picked);
    }
  };
  const show = () => {
    const chosen = small[Number(slider.value)];
    for (const picture of small) picture.classList.toggle("chosen", picture === chosen);
    shown.value = chosen.dataset.timestep;
    slider.setAttribute("aria-valuetext", `timestep ${chosen.dataset.timestep}`);
    chosen.decode().then(() => {
      pixels.drawImage(chosen, 0, 0, side, side);
      tell();
    });
  };
  const inside = (value) => Math.min(Math.max(value, 0), side - 1);
  for (const name of ["pointermove", "pointerdown"]) {
    map.addEventListener(name, (event) => {
      const edges = map.getBoundingClientRect();
      at = [inside(Math.floor(((event.clientX - edges.left) / edges.width) * side)), inside(Math.floor(((event.clientY - edges.top) / edges.height) * side))];
      tell();
    });
  }
  map.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    at = at.map((value, axis) => inside(value + moves[event.key][axis]));
    tell();
  });
  small.forEach((picture, number) => {
    picture.addEventListener("click", () => {
      slider.value = String(number);
      show();
    });
  });
  slider.addEventListener("input", show);
  box.hidden = false;
  show();
})();
