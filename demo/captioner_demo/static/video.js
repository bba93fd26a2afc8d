// The video tab. captioner.clip(element, trigger) runs when its component is loaded; captioner_demo/video.py
// makes the HTML. captioner.overlaid plays the overlay video.
(function () {
  const shared = window.captioner;
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // The address of a file that the server keeps for this page.
  function address(path) {
    const config = window.gradio_config || {};
    const root = config.root ? new URL(config.root, location.href).pathname : location.pathname;
    return root.replace(/\/$/, "") + (config.api_prefix || "/gradio_api") + "/file=" +
      path.split("/").map(encodeURIComponent).join("/");
  }

  function make(parent, name, kind, text) {
    const element = document.createElement(name);
    if (kind) element.className = kind;
    if (text) element.textContent = text;
    parent.appendChild(element);
    return element;
  }

  function button(parent, kind, text) {
    const element = make(parent, "button", kind, text);
    element.type = "button";
    return element;
  }

  // Weights come as 16 bits each, and are unpacked when the word is first shown.
  function weights(word) {
    const packed = word.attention;
    if (!packed.cells) {
      const letters = atob(packed.data), bytes = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
      const view = new DataView(bytes.buffer);
      packed.cells = Float32Array.from({ length: bytes.length / 2 },
        (_, i) => view.getUint16(2 * i, true) / 65535 * packed.most);
    }
    return packed.cells;
  }

  // How much of a word's attention a frame got: of hundreds of frames, each has less than a percent.
  const times = (one, share) => (share * one.frames).toFixed(1) + "×";
  const part = (one, share) => one.frames > one.times.length ? times(one, share) : shared.percent(share);

  function clip(element, trigger) {
    let root = null, data = null, now = null, video = null, cue = null, segment = -1, pinned = -1, shown = -1;
    const find = (selector) => root.querySelector(selector);
    const all = (selector) => Array.from(root.querySelectorAll(selector));

    function renewed() {
      const found = element.querySelector(".cap-clip"), text = found && found.dataset.clip;
      if (text === now) return; // Gradio may replace elements or only change their attributes
      root = found;
      now = text;
      if (video) video.pause();
      video = data = null;
      if (!root) return;
      data = JSON.parse(text);
      segment = pinned = shown = -1;
      timeline();
      player();
      if (data.segments.length) select(0, false);
    }

    // --- player and timeline -------------------------------------------------------------------------

    function player() {
      const place = find(".cap-player");
      place.textContent = "";
      video = make(place, "video");
      video.controls = true;
      video.playsInline = true;
      video.preload = "auto";
      video.setAttribute("aria-label", "The clip");
      const track = video.addTextTrack("captions", "captioner", "en");
      data.segments.forEach((one) => track.addCue(new VTTCue(one.start, one.end,
        one.text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"))));
      track.mode = "hidden"; // shown beside the clip; the player's menu turns them on
      video.addEventListener("timeupdate", moved);
      video.addEventListener("seeking", moved);
      video.addEventListener("play", tick);
      video.addEventListener("error", function () {
        // the frames that were captioned stand for what this browser cannot play
        place.classList.add("cap-still");
        place.textContent = "";
        make(place, "img").alt = "";
        make(place, "p", "cap-hint", "This browser cannot play the file; select frames and segments instead.");
        video = null;
        if (segment >= 0) still(data.segments[segment].start);
      });
      video.src = address(data.path);
    }

    function still(time) {
      const image = find(".cap-still img"), one = data.segments[segment];
      if (!image || !one || !one.times.length) return;
      let best = 0;
      one.times.forEach((t, i) => { if (Math.abs(t - time) < Math.abs(one.times[best] - time)) best = i; });
      if (!one.pictures[best]) return;
      image.src = "data:image/jpeg;base64," + one.pictures[best];
      image.alt = one.text;
      marker(one.times[best]);
    }

    function seek(time) {
      if (video) { video.currentTime = time; marker(time); } else { still(time); }
    }

    function marker(time) {
      cue.style.left = 100 * clamp(time / (data.duration || 1), 0, 1) + "%";
      const one = data.segments[segment];
      if (!one) return;
      let at = -1;
      one.times.forEach((t, i) => { if (t <= time + 0.05) at = i; });
      all(".cap-frame").forEach((frame, i) => frame.classList.toggle("cap-now", i === at));
    }

    function moved() {
      if (!video || !root) return;
      const time = video.currentTime;
      if (!video.paused) { // the page follows the clip
        const at = data.segments.findIndex((one) => time >= one.start && time < one.end);
        if (at >= 0 && at !== segment) select(at, false);
      }
      marker(time);
    }

    function tick() {
      if (!video || video.paused || !video.isConnected) return;
      moved();
      requestAnimationFrame(tick);
    }

    function timeline() {
      const track = find(".cap-track"), list = find(".cap-transcript");
      track.textContent = list.textContent = "";
      data.segments.forEach(function (one, i) {
        const block = button(track, "cap-block");
        block.dataset.segment = i;
        block.style.flexGrow = Math.max(one.end - one.start, 0.01);
        block.setAttribute("aria-label", "Segment " + (i + 1) + ", " + one.when + ": " + one.text);
        block.title = one.when;
        const room = track.clientWidth * (one.end - one.start) / (data.duration || 1);
        const count = clamp(Math.round(room / (58 * one.size[0] / one.size[1])), 1, one.pictures.length);
        for (let k = 0; k < count; k++) {
          const picture = one.pictures[Math.floor((k + 0.5) / count * one.pictures.length)];
          if (!picture) continue;
          const image = make(block, "img");
          image.alt = "";
          image.src = "data:image/jpeg;base64," + picture;
        }
        const row = button(make(list, "li"), "cap-line");
        row.dataset.segment = i;
        make(row, "span", "cap-time", one.when);
        make(row, "span", "cap-text", one.text);
      });
      cue = make(track, "i", "cap-cue");
      cue.setAttribute("aria-hidden", "true");
    }

    // --- one segment ---------------------------------------------------------------------------------

    function select(index, go) {
      const one = data.segments[index];
      segment = index;
      pinned = shown = -1;
      all("[data-segment]").forEach(function (each) {
        const here = Number(each.dataset.segment) === index;
        each.setAttribute("aria-pressed", String(here));
        if (each.matches(".cap-block")) each.tabIndex = here ? 0 : -1;
      });
      find(".cap-when").textContent = one.when;
      const sentence = find(".cap-sentence");
      sentence.textContent = "";
      one.words.forEach(function (word, i) {
        if (i && !word.word.startsWith("'")) sentence.append(" ");
        const said = button(sentence, "cap-word", word.word);
        said.dataset.word = i;
        said.title = "probability " + shared.percent(word.p);
        said.setAttribute("aria-pressed", "false");
        said.style.setProperty("--doubt", Math.pow(1 - clamp(word.p, 0, 1), 1.7).toFixed(3));
      });
      if (!one.words.length) make(sentence, "em", "", "no words");
      const sure = find(".cap-sure");
      sure.className = "cap-sure cap-" + one.mark;
      sure.lastElementChild.textContent = one.sure;
      frames(one);
      show(-1);
      root.dataset.segment = index;
      if (go) seek(one.start);
      marker(video && !go ? video.currentTime : one.start);
    }

    function frames(one) {
      const list = find(".cap-frames");
      list.textContent = "";
      // heat is smooth: few pixels are enough, and all frames together are drawn at once
      const side = clamp(Math.sqrt(160000 / Math.max(1, one.times.length)), 72, 160);
      one.times.forEach(function (time, i) {
        const frame = button(make(list, "li"), "cap-frame");
        frame.dataset.frame = i;
        frame.setAttribute("aria-label", "Frame at " + one.clocks[i] + ": go there");
        const picture = make(frame, "span", "cap-picture");
        picture.style.setProperty("--w", one.size[0]);
        picture.style.setProperty("--h", one.size[1]);
        const image = make(picture, "img");
        image.alt = "";
        image.draggable = false;
        if (one.pictures[i]) image.src = "data:image/jpeg;base64," + one.pictures[i];
        const canvas = make(picture, "canvas"), most = Math.max(one.size[0], one.size[1]);
        canvas.setAttribute("aria-hidden", "true");
        canvas.width = Math.max(1, Math.round(side * one.size[0] / most));
        canvas.height = Math.max(1, Math.round(side * one.size[1] / most));
        const under = make(frame, "span", "cap-undertime");
        make(under, "span", "", one.clocks[i]);
        make(under, "span", "cap-share");
        const bar = make(frame, "span", "cap-bar");
        make(bar, "i");
        make(bar, "b");
      });
    }

    // Draw the attention of a word in every frame; -1 for the bare frames.
    function show(index) {
      shown = index;
      const one = data.segments[segment], word = index < 0 ? null : one.words[index];
      const seen = word && word.attention;
      all(".cap-word").forEach((each, i) => each.classList.toggle("cap-on", i === index));
      root.dataset.shown = index;
      const some = one.frames > one.times.length ? one.times.length + " of its " + one.frames + " frames" : "";
      find(".cap-lookhead h3").textContent = seen
        ? "Where it looked for “" + word.word + "”" + (some && ", in " + some)
        : some || (one.frames === 1 ? "Its one frame" : "Its " + one.frames + " frames");
      const legend = find(".cap-look .cap-legend");
      legend.hidden = !seen;
      legend.lastElementChild.textContent = Number(one.top.toPrecision(3)) + "× that";
      find(".cap-frames").classList.toggle("cap-on", Boolean(seen));
      const cells = seen && weights(word), size = one.grid[0] * one.grid[1];
      const peak = seen ? Math.max.apply(null, seen.shares) : 0;
      let longest = 0;
      one.words.forEach((each) => { if (each.attention) longest = Math.max(longest, ...each.attention.shares); });
      all(".cap-frame").forEach(function (frame, i) {
        const best = Boolean(seen) && seen.shares[i] === peak && peak > 1.05 / one.frames;
        frame.classList.toggle("cap-peak", best);
        frame.querySelector(".cap-share").textContent = seen ? part(one, seen.shares[i]) : "";
        if (!seen) return;
        shared.heat(frame.querySelector("canvas"), cells.subarray(i * size, (i + 1) * size), one, true);
        frame.querySelector(".cap-bar i").style.width = 100 * seen.shares[i] / longest + "%";
        frame.querySelector(".cap-bar b").style.left = 100 * clamp(1 / one.frames / longest, 0, 1) + "%";
      });
      const card = find(".cap-card");
      if (word) {
        shared.describe(card, word, false);
        if (seen && one.frames > 1) {
          const at = seen.shares.indexOf(peak), text = peak > 1.05 / one.frames
            ? "It looked most at " + one.clocks[at] + ": " + (some ? "" : shared.percent(peak) +
              " of its attention there, ") + times(one, peak) + " an even share."
            : "It looked at all frames about alike.";
          make(card, "p", "cap-hint", text);
        }
      } else {
        card.textContent = "";
        make(card, "p", "cap-hint", card.dataset.hint);
      }
    }

    function pin(index) {
      pinned = index;
      all(".cap-word").forEach((each, i) => each.setAttribute("aria-pressed", String(i === index)));
      show(index);
      const word = data.segments[segment].words[index];
      find(".cap-sr").textContent = word ? word.word + ", " + shared.percent(word.p) : "";
    }

    // --- events --------------------------------------------------------------------------------------

    const wordAt = (event) => {
      const found = event.target.closest && event.target.closest(".cap-word");
      return found ? Number(found.dataset.word) : -1;
    };
    element.addEventListener("pointerover", function (event) {
      if (root && event.pointerType === "mouse" && wordAt(event) >= 0 && pinned < 0 && shown !== wordAt(event))
        show(wordAt(event));
    });
    element.addEventListener("pointerout", function (event) {
      if (root && event.pointerType === "mouse" && wordAt(event) >= 0 && pinned < 0) show(-1);
    });
    element.addEventListener("click", function (event) {
      const target = event.target.closest("button");
      if (!root || !target) return;
      if (target.matches(".cap-word")) {
        if (video) video.pause(); // a look at one word holds the clip
        pin(pinned === Number(target.dataset.word) ? -1 : Number(target.dataset.word));
      } else if (target.dataset.segment !== undefined) {
        select(Number(target.dataset.segment), true);
      } else if (target.matches(".cap-frame")) {
        if (video) video.pause();
        seek(data.segments[segment].times[Number(target.dataset.frame)]);
      } else if (target.dataset.do === "another") {
        if (video) video.pause();
        trigger("submit", { action: "another" });
      }
    });
    element.addEventListener("keydown", function (event) {
      if (!root) return;
      const word = wordAt(event), block = event.target.closest(".cap-block");
      if (word < 0 && !block) return;
      const list = all(block ? ".cap-block" : ".cap-word"), at = block ? segment : word;
      const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: list.length - 1 }[event.key];
      if (event.key === "Escape" && !block) pin(-1);
      if (next === undefined || !list[next]) return;
      event.preventDefault();
      if (block) select(next, true);
      list[next].focus();
      if (!block && pinned >= 0) pin(next);
    });
    new MutationObserver(renewed).observe(
      element, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-clip"] });
    renewed();
  }

  // The overlay video: it plays in the page, and can be saved.
  function overlaid(element) {
    let now = null;
    function renewed() {
      const root = element.querySelector(".cap-overlay"), text = root && root.dataset.overlay;
      if (text === now) return;
      now = text;
      if (!root) return;
      const data = JSON.parse(text), place = root.querySelector(".cap-player"), link = root.querySelector("a");
      place.textContent = "";
      const video = make(place, "video");
      video.controls = video.playsInline = true;
      video.preload = "auto";
      video.setAttribute("aria-label", "Overlay video: captions and attention drawn on the clip");
      video.addEventListener("loadedmetadata", function () {
        place.style.setProperty("--w", video.videoWidth || 16);
        place.style.setProperty("--h", video.videoHeight || 9);
      });
      video.src = link.href = address(data.path);
      link.download = data.name;
      video.scrollIntoView({ block: "nearest" });
    }
    new MutationObserver(renewed).observe(
      element, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-overlay"] });
    renewed();
  }

  Object.assign(shared, { clip, overlaid });
}());
