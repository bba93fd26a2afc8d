"use strict";
// What the tabs share in the browser. A tab's component runs  captioner.explorer(element, trigger)  when it is
// loaded; its HTML (captioner_demo/page.py) may be replaced by the server at any time after.
(function () {
  if (window.captioner) return;
  const ramp = window.captionerRamp, LAST = ramp.length / 4 - 1;
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  function percent(p) {
    return p > 0 && p < 0.01 ? "<1 %" : p > 0.99 && p < 1 ? ">99 %" : Math.round(100 * p) + " %";
  }

  // For each pixel along an axis: two cells and the share of the second, or null where the model saw nothing.
  function axis(pixels, low, high, cells, smooth) {
    return Array.from({ length: pixels }, (_, i) => {
      const at = ((i + 0.5) / pixels - low) / (high - low) * cells;
      if (at < 0 || at >= cells) return null;
      if (!smooth) return [Math.floor(at), Math.floor(at), 0];
      const between = clamp(at - 0.5, 0, cells - 1), first = Math.floor(between), t = between - first;
      return [first, Math.min(first + 1, cells - 1), 0.5 * t + 0.5 * t * t * (3 - 2 * t)];
    });
  }

  // Draw weights (H * W numbers, row by row) on a canvas that lies over the picture; as captioner.overlay does.
  // data: grid [H, W], box in shares of the picture, even, top.
  function heat(canvas, weights, data, smooth) {
    const [H, W] = data.grid, context = canvas.getContext("2d");
    const width = canvas.width, height = canvas.height, log = Math.log(data.top);
    const cells = weights.map((w) => w / data.even < 1.0001 ? 0 : Math.min(Math.log(w / data.even) / log, 1));
    const across = axis(width, data.box[0], data.box[2], W, smooth);
    const down = axis(height, data.box[1], data.box[3], H, smooth);
    const image = context.createImageData(width, height), pixels = image.data;
    let at = 0;
    for (let y = 0; y < height; y++) {
      const d = down[y];
      for (let x = 0; x < width; x++, at += 4) {
        const a = across[x];
        if (!d || !a) {
          const line = (x + y) % 8 < 1;
          pixels[at] = pixels[at + 1] = pixels[at + 2] = line ? 110 : 0;
          pixels[at + 3] = line ? 170 : 158;
          continue;
        }
        const upper = cells[d[0] * W + a[0]] * (1 - a[2]) + cells[d[0] * W + a[1]] * a[2];
        const lower = cells[d[1] * W + a[0]] * (1 - a[2]) + cells[d[1] * W + a[1]] * a[2];
        const colour = 4 * Math.round((upper * (1 - d[2]) + lower * d[2]) * LAST);
        pixels[at] = ramp[colour];
        pixels[at + 1] = ramp[colour + 1];
        pixels[at + 2] = ramp[colour + 2];
        pixels[at + 3] = ramp[colour + 3];
      }
    }
    context.putImageData(image, 0, 0);
  }

  // A canvas as sharp as it is worth: heat is smooth, and few pixels are quick.
  function fit(canvas, width, height) {
    const factor = Math.min(1, 640 / Math.max(width, height));
    canvas.width = Math.max(1, Math.round(width * factor));
    canvas.height = Math.max(1, Math.round(height * factor));
  }

  function add(parent, name, text, kind) {
    const element = document.createElement(name);
    if (text) element.textContent = text;
    if (kind) element.className = kind;
    parent.appendChild(element);
    return element;
  }

  function meter(parent, share) {
    const bar = add(parent, "span", "", "cap-meter");
    add(bar, "i").style.width = 100 * clamp(share, 0, 1) + "%";
  }

  // What can be said of a word: probability, alternatives to choose, a word of one's own. Texts are never HTML.
  function describe(card, word, choosable) {
    card.textContent = "";
    const top = add(card, "div", "", "cap-cardtop");
    add(top, "strong", word.word);
    add(top, "span", word.given ? "your word" : percent(word.p));
    if (!word.given) meter(card, word.p);
    if (!word.attention) add(card, "p", "There is no attention for this word.", "cap-hint");
    if (word.alternatives.length) {
      add(card, "h3", choosable ? "It could have said – choose, and it goes on from there" : "It could have said");
      const list = add(card, "ul", "", "cap-alternatives");
      word.alternatives.forEach(function (other) {
        const [text, p] = other, item = add(list, "li"), here = text === word.word;
        const able = choosable && !here && text !== "<end>" && !text.startsWith("##");
        const row = add(item, able ? "button" : "div", "", "cap-alternative" + (here ? " cap-here" : ""));
        if (able) {
          row.type = "button";
          row.dataset.alternative = text;
        }
        add(row, "span", text === "<end>" ? "(nothing more)" : text);
        add(row, "span", percent(p));
        meter(row, p);
      });
    }
    if (choosable) {
      const form = add(card, "form", "", "cap-own");
      const label = add(form, "label", "Or a word of yours");
      const input = add(label, "input");
      input.type = "text";
      input.maxLength = 60;
      input.autocomplete = "off";
      add(form, "button", "Say it", "cap-tool").type = "submit";
    }
  }

  // ---------------------------------------------------------------------------------------------------

  function explorer(element, trigger) {
    let root = null, data = null, pinned = -1, shown = -1, timer = 0, boxing = false, smooth = true, drag = null;
    let box = null; // in shares of the photo
    let now = null; // what was sent last
    const find = (selector) => root.querySelector(selector);
    const words = () => Array.from(root.querySelectorAll(".cap-word"));
    const send = (action, more) => trigger("submit", Object.assign({ action: action }, more));

    function renewed() {
      const found = element.querySelector(".cap-explorer");
      const text = found && found.dataset.caption;
      if (text === now) return; // Gradio may replace elements or only change their attributes
      const focused = element.contains(document.activeElement) || document.activeElement === document.body;
      const had = root !== null;
      root = found;
      now = text;
      stop();
      if (!root) { data = null; return; }
      data = JSON.parse(root.dataset.caption);
      pinned = shown = -1;
      boxing = false;
      box = data.region && [data.region[0] / data.size[0], data.region[1] / data.size[1],
        data.region[2] / data.size[0], data.region[3] / data.size[1]];
      fit(find("canvas"), data.size[0], data.size[1]);
      place();
      if (data.selected >= 0) {
        pin(data.selected);
        if (had && focused) words()[pinned].focus({ preventScroll: true });
      }
    }

    // --- words ---------------------------------------------------------------------------------------

    function show(index, again) {
      if (!root || (index === shown && !again)) return;
      shown = index;
      words().forEach((button, i) => button.classList.toggle("cap-on", i === index));
      const word = index < 0 ? null : data.words[index], photo = find(".cap-photo");
      photo.classList.toggle("cap-on", Boolean(word && word.attention));
      if (word && word.attention) heat(find("canvas"), word.attention, data, smooth);
      root.dataset.shown = index;
      if (!word) return;
      describe(find(".cap-card"), word, true);
      find(".cap-card").dataset.word = index;
    }

    function pin(index) {
      pinned = index;
      words().forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
      show(index);
      const word = data.words[index];
      find(".cap-sr").textContent = !word ? "" : word.word + ", " + (word.given ? "your word" : percent(word.p)) +
        (word.alternatives.length ? ". " + word.alternatives.length + " alternatives follow." : "");
    }

    function stop() {
      clearInterval(timer);
      timer = 0;
      const button = root && find("[data-do=play]");
      if (button) button.textContent = "Play";
    }

    function play(button) {
      if (timer) { stop(); pin(-1); return; }
      let next = 0;
      button.textContent = "Stop";
      pin(0);
      timer = setInterval(function () {
        next += 1;
        if (next < data.words.length) { pin(next); } else { stop(); pin(-1); }
      }, 900);
    }

    function choose(text) {
      const index = Number(find(".cap-card").dataset.word);
      if (text.trim()) send("choose", { word: index, text: text.trim() });
    }

    // --- boxing --------------------------------------------------------------------------------------

    function place() {
      const button = find(".cap-box"), toggle = find("[data-do=box]");
      const visible = Boolean(box) && (boxing || Boolean(data.region) || Boolean(drag));
      button.hidden = !visible;
      find(".cap-photo").classList.toggle("cap-boxing", boxing);
      find(".cap-boxhint").hidden = !boxing;
      toggle.setAttribute("aria-pressed", String(boxing));
      if (!visible) return;
      const sides = ["left", "top", "width", "height"];
      [box[0], box[1], box[2] - box[0], box[3] - box[1]].forEach(
        (share, i) => { button.style[sides[i]] = 100 * share + "%"; });
      const said = box.map((share) => Math.round(100 * share) + " %");
      button.setAttribute("aria-label", "Box from " + said[0] + " across and " + said[1] + " down to " + said[2] +
        " across and " + said[3] + " down. Arrow keys move it, Shift and arrow keys size it, Enter captions it.");
    }

    function region() {
      const [w, h] = data.size;
      send("region", { left: box[0] * w, top: box[1] * h, right: box[2] * w, bottom: box[3] * h });
    }

    function startBoxing() {
      boxing = !boxing;
      if (boxing && !box) box = [0.25, 0.25, 0.75, 0.75];
      if (!boxing && !data.region) box = null;
      place();
      if (boxing) find(".cap-box").focus({ preventScroll: true });
    }

    function share(event) {
      const r = find(".cap-photo").getBoundingClientRect();
      return [clamp((event.clientX - r.left) / r.width, 0, 1), clamp((event.clientY - r.top) / r.height, 0, 1)];
    }

    function dragged(event) {
      const [x, y] = share(event), [x0, y0] = drag.from;
      box = [Math.min(x, x0), Math.min(y, y0), Math.max(x, x0), Math.max(y, y0)];
      const photo = find(".cap-photo");
      return (box[2] - box[0]) * photo.clientWidth > 8 && (box[3] - box[1]) * photo.clientHeight > 8;
    }

    element.addEventListener("pointerdown", function (event) {
      if (!root || event.button !== 0 || !event.target.closest(".cap-photo")) return;
      if (event.pointerType !== "mouse" && !boxing) return; // a finger scrolls
      event.preventDefault();
      drag = { from: share(event), before: box, id: event.pointerId, moved: false };
      find(".cap-photo").setPointerCapture(event.pointerId);
    });
    element.addEventListener("pointermove", function (event) {
      if (!drag || event.pointerId !== drag.id) return;
      drag.moved = dragged(event) || drag.moved;
      if (drag.moved) place();
    });
    function released(event) {
      if (!drag || event.pointerId !== drag.id) return;
      const big = event.type === "pointerup" && dragged(event), before = drag.before;
      drag = null;
      if (big) {
        boxing = true;
        place();
        region();
      } else {
        box = before;
        place();
      }
    }
    element.addEventListener("pointerup", released);
    element.addEventListener("pointercancel", released);

    function moveBox(event) {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "Escape") {
        boxing = true;
        startBoxing();
        find("[data-do=box]").focus();
      }
      if (!step) return;
      event.preventDefault();
      boxing = true;
      const [dx, dy] = step.map((s) => 0.02 * s);
      if (event.shiftKey) {
        box[2] = clamp(box[2] + dx, box[0] + 0.04, 1);
        box[3] = clamp(box[3] + dy, box[1] + 0.04, 1);
      } else {
        const x = clamp(dx, -box[0], 1 - box[2]), y = clamp(dy, -box[1], 1 - box[3]);
        box = [box[0] + x, box[1] + y, box[2] + x, box[3] + y];
      }
      place();
    }

    // --- events --------------------------------------------------------------------------------------

    const wordAt = (event) => {
      const button = event.target.closest && event.target.closest(".cap-word");
      return button ? Number(button.dataset.word) : -1;
    };
    element.addEventListener("pointerover", function (event) {
      if (event.pointerType === "mouse" && !timer && wordAt(event) >= 0 && pinned < 0) show(wordAt(event));
    });
    element.addEventListener("pointerout", function (event) {
      if (event.pointerType === "mouse" && !timer && wordAt(event) >= 0 && pinned < 0) show(-1);
    });
    element.addEventListener("focusin", function (event) {
      const index = wordAt(event);
      if (index >= 0 && event.target.matches(":focus-visible")) { stop(); if (pinned < 0) show(index); }
    });
    element.addEventListener("click", function (event) {
      if (!root) return;
      const target = event.target.closest("button");
      if (!target) return;
      if (target.matches(".cap-word")) {
        stop();
        const index = Number(target.dataset.word);
        pin(pinned === index ? -1 : index);
      } else if (target.matches(".cap-alternative")) {
        choose(target.dataset.alternative);
      } else if (target.matches(".cap-candidate")) {
        send("candidate", { index: Number(target.dataset.candidate) });
      } else if (target.matches(".cap-box")) {
        if (boxing && event.detail === 0) region(); // Enter, not the end of a drag
      } else if (target.dataset.do === "box") {
        startBoxing();
      } else if (target.dataset.do === "play") {
        play(target);
      } else if (target.dataset.do === "cells") {
        smooth = !smooth;
        target.setAttribute("aria-pressed", String(!smooth));
        show(shown, true);
      } else if (target.dataset.do) {
        send(target.dataset.do);
      }
    });
    element.addEventListener("submit", function (event) {
      if (!event.target.matches(".cap-own")) return;
      event.preventDefault();
      event.stopPropagation();
      choose(event.target.querySelector("input").value);
    });
    element.addEventListener("keydown", function (event) {
      if (!root) return;
      if (event.target.matches(".cap-box")) { moveBox(event); return; }
      const index = wordAt(event);
      if (index < 0) return;
      const all = words();
      const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: all.length - 1 }[event.key];
      if (event.key === "Escape") { stop(); pin(-1); }
      if (next === undefined || !all[next]) return;
      event.preventDefault();
      all[next].focus();
      if (pinned >= 0) pin(next);
    });
    new MutationObserver(renewed).observe(
      element, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-caption"] });
    renewed();
  }

  // Anything with buttons that carry data-pick: a gallery, a list.
  function picker(element, trigger) {
    element.addEventListener("click", function (event) {
      const button = event.target.closest("[data-pick]");
      if (button) trigger("submit", { pick: Number(button.dataset.pick) });
    });
  }

  // Hand a file over that the server sent as {name, type, base64}.
  function download(file) {
    if (!file || !file.base64) return;
    const bytes = Uint8Array.from(atob(file.base64), (letter) => letter.charCodeAt(0));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes], { type: file.type }));
    link.download = file.name;
    document.body.appendChild(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  // A picture that is pasted anywhere, or dropped beside the upload, goes into the visible tab's upload.
  function intake(files) {
    const input = Array.from(document.querySelectorAll(".cap-intake input[type=file]"))
      .find((one) => one.closest("[role=tabpanel]") === null || one.closest("[role=tabpanel]").offsetParent !== null);
    const pictures = Array.from(files || []).filter((file) => file.type.startsWith("image/"));
    if (!input || !pictures.length) return false;
    const carrier = new DataTransfer();
    carrier.items.add(pictures[0]);
    input.files = carrier.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    return true;
  }
  document.addEventListener("paste", function (event) {
    if (event.target.closest && event.target.closest("input, textarea")) return;
    if (intake(event.clipboardData && event.clipboardData.files)) event.preventDefault();
  });
  document.addEventListener("dragover", (event) => {
    if (!event.target.closest(".cap-intake")) event.preventDefault();
  });
  document.addEventListener("drop", function (event) {
    if (event.target.closest(".cap-intake")) return;
    event.preventDefault(); // a browser would leave the page for the picture
    intake(event.dataTransfer && event.dataTransfer.files);
  });

  window.captioner = { heat, fit, describe, explorer, picker, download, percent };
}());
