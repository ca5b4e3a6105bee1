"use strict";

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
    hint.textContent = mode === "difference" ? `${hints[mode]} Amplified ${factor} times.` : hints[mode];
  };
  modes.addEventListener("input", show);
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
