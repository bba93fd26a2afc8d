"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const about = JSON.parse($("about").textContent), ramp = about.colours, LAST = ramp.length / 4 - 1;
  const sheet = $("sheet"), tools = $("tools"), collator = new Intl.Collator(undefined, { numeric: true });
  const LEVELS = [[0.65, "good"], [0.45, "fair"], [0.3, "doubt"], [0, "guess"]];
  const WORDS = { good: "quite sure", fair: "fairly sure", doubt: "not very sure", guess: "a guess" };
  const BARS = 20;

  const rows = [], groups = new Map(), said = new Map(), bars = new Array(BARS).fill(0);
  const count = { all: 0, doubtful: 0, errors: 0, alike: 0, again: 0, clips: 0, edited: 0, flagged: 0 };
  let models = [], whole = false, view = [];
  const state = { show: "all", sort: "run", terms: [], low: 0, high: 100, only: null };

  const number = (n) => n.toLocaleString("en");
  const plural = (n, one, many) => number(n) + " " + (n === 1 ? one : many);
  const base = (path) => path.replace(/[\\/]+$/, "").split(/[\\/]/).pop() || path;
  const level = (sure) => LEVELS.find(([least]) => sure >= least || !least)[1];
  function clock(seconds) {
    const s = Math.round(seconds), pad = (n) => String(n).padStart(2, "0");
    const minutes = Math.floor(s / 60);
    return minutes < 60 ? minutes + ":" + pad(s % 60) : Math.floor(minutes / 60) + ":" + pad(minutes % 60) + ":" + pad(s % 60);
  }

  // --- what a person has changed: kept in the browser until it is downloaded, where the browser allows it

  const KEY = "captioner-sheet-" + about.key;
  const edits = new Map(), flags = new Set();
  let stored = true, due = false;
  try {
    const found = JSON.parse(localStorage.getItem(KEY) || "{}");
    for (const [path, caption] of found.edits || []) edits.set(path, caption);
    for (const path of found.flags || []) flags.add(path);
  } catch { stored = false; }
  function keep() {
    due = true;
    try {
      localStorage.setItem(KEY, JSON.stringify({ edits: [...edits], flags: [...flags] }));
      stored = true;
    } catch { stored = false; }
    tally();
  }
  addEventListener("beforeunload", (event) => { if (due && !stored) event.preventDefault(); });

  const current = (row) => edits.get(row.path) ?? row.caption;
  const flagged = (row) => flags.has(row.path);
  const edited = (row) => edits.has(row.path);

  // --- reading: elements with some rows each arrive while the page is being read

  let last = null;
  function read(element) {
    const text = element.textContent, end = text.indexOf("\n");
    for (const [k, fields] of JSON.parse(text.slice(0, end)).entries()) {
      const [path, caption, sure, error, parts, link, group, duration, model] = fields;
      const row = { i: rows.length, path, caption, sure, error, parts, link, group, duration, model, element, k, hay: null };
      rows.push(row);
      count.all++;
      if (error !== null) count.errors++;
      if (duration !== null) count.clips++;
      if (sure !== null) {
        bars[Math.min(BARS - 1, Math.floor(sure * BARS))]++;
        if (sure < about.doubtful) count.doubtful++;
      }
      if (group) {
        if (!groups.has(group)) groups.set(group, []);
        groups.get(group).push(row);
      }
      if (caption) {
        const same = said.get(caption) || [];
        if (!same.length) said.set(caption, same);
        same.push(row);
        if (same.length > 1) count.again += same.length === 2 ? 2 : 1;
      }
      if (edits.get(path) === caption) edits.delete(path);
    }
  }
  function pull() {
    let next = last ? last.nextElementSibling : document.querySelector("script.rows"), any = false;
    const done = document.readyState !== "loading";
    for (; next && next.className === "rows"; next = next.nextElementSibling) {
      if (!next.nextElementSibling && !done) break;  // its text may still be on the way
      read(next);
      last = next;
      any = true;
    }
    return any;
  }
  let shownAt = 0;
  function more() {
    if (whole) return;
    const any = pull();
    if (document.readyState !== "loading") {
      whole = true;
      watcher.disconnect();
      models = JSON.parse(($("end") || { textContent: "[]" }).textContent);
      // a group whose other pictures are not on this page is none
      for (const [key, group] of groups) if (group.length < 2) { group.forEach((row) => { row.group = 0; }); groups.delete(key); }
      count.alike = [...groups.values()].reduce((sum, group) => sum + group.length, 0);
      facts();
      tally();
      apply();
      for (const [row, card] of cards) if (!card.classList.contains("editing")) fill(card, row);  // now it is known what is there twice
      update();
    } else if (any && performance.now() - shownAt > 400) {
      shownAt = performance.now();
      tally();
      apply();
    }
  }
  const watcher = new MutationObserver(more);
  watcher.observe(document.body, { childList: true });
  document.addEventListener("DOMContentLoaded", more);

  function preview(row) {
    const text = row.element.textContent;
    let from = text.indexOf("\n") + 1;
    for (let k = 0; k < row.k; k++) from = text.indexOf("\n", from) + 1;
    const line = text.slice(from, text.indexOf("\n", from));
    if (!line) return null;
    const head = new DataView(bytes(line.slice(0, 40)).buffer);
    const byte = (at) => head.getUint8(at), short = (at) => head.getUint16(at, true);
    const H = byte(1), W = byte(2), maps = short(8), length = 4 * Math.ceil(maps * H * W / 3);
    return {
      H, W, maps, width: byte(3), height: byte(4), first: short(6), tops: [short(10), short(12)],
      box: [14, 18, 22, 26].map((at) => head.getFloat32(at, true)),
      heat: line.slice(40, 40 + length), picture: "data:image/webp;base64," + line.slice(40 + length),
    };
  }
  function bytes(base64) {
    const text = atob(base64), found = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
    return found;
  }

  function facts() {
    const clips = count.clips ? ", " + plural(count.clips, "video", "videos") : "";
    const alike = groups.size ? " · " + number(count.alike) + " look alike, in " + plural(groups.size, "group", "groups") : "";
    const repeats = [...said.values()].filter((same) => same.length > 1).length;
    const again = repeats ? " · " + plural(repeats, "caption is", "captions are") + " said more than once" : "";
    $("facts").textContent = plural(count.all - count.clips, "picture", "pictures") + clips + alike + again
      + (models.filter(Boolean).length ? " · by " + models.filter(Boolean).join(", ") : "");
  }

  function tally() {
    count.edited = count.flagged = 0;
    if (edits.size || flags.size) {
      for (const row of rows) { if (edited(row)) count.edited++; if (flagged(row)) count.flagged++; }
    }
    for (const input of tools.querySelectorAll("[name=show]")) {
      const many = count[input.value];
      input.nextElementSibling.lastElementChild.textContent = number(many);
      input.disabled = !many && input.value !== "all" && !input.checked;
    }
    for (const kind of ["edited", "flagged"]) {
      $("save-" + kind).disabled = !count[kind];
      $("save-" + kind).classList.toggle("due", kind === "edited" && due && count.edited > 0);
    }
    histogram();
  }
  for (let i = 0; i < BARS; i++) $("bars").append(document.createElement("i"));
  function histogram() {
    const most = Math.max(1, ...bars);
    [...$("bars").children].forEach((bar, i) => {
      bar.style.height = bars[i] ? Math.max(8, 100 * bars[i] / most) + "%" : "0";
      bar.className = 100 * (i + 1) / BARS > state.low && 100 * i / BARS < state.high ? "on" : "";
    });
  }

  // --- sorting and filtering

  const KINDS = {
    all: () => true, doubtful: (row) => row.sure !== null && row.sure < about.doubtful, errors: (row) => row.error !== null,
    alike: (row) => row.group > 0, again: (row) => said.get(row.caption)?.length > 1, clips: (row) => row.duration !== null,
    edited, flagged,
  };
  const lacking = (a, b) => (a.sure === null) - (b.sure === null);  // what has no confidence comes last
  const ORDERS = {
    run: null, path: (a, b) => a.rank - b.rank, least: (a, b) => lacking(a, b) || a.sure - b.sure,
    most: (a, b) => lacking(a, b) || b.sure - a.sure,
    short: (a, b) => current(a).length - current(b).length, long: (a, b) => current(b).length - current(a).length,
  };
  function rank() {
    if (rows.length && rows[rows.length - 1].rank === undefined) {
      [...rows].sort((a, b) => collator.compare(a.path, b.path)).forEach((row, i) => { row.rank = i; });
    }
  }
  function matches(row) {
    row.hay ??= (row.path + "\n" + row.caption + "\n" + (row.error || "")).toLowerCase();
    const own = edits.get(row.path)?.toLowerCase() || "";
    return state.terms.every((term) => row.hay.includes(term) || own.includes(term));
  }
  function apply() {
    const kind = KINDS[state.show], least = state.low / 100, greatest = state.high / 100, only = state.only;
    const every = state.low === 0 && state.high === 100;
    view = (only ? only.rows : rows).filter((row) => (only || kind(row))
      && (every || (row.sure !== null && row.sure >= least && row.sure <= greatest)) && (!state.terms.length || matches(row)));
    if (state.sort === "path") rank();
    const order = ORDERS[state.sort];
    if (order) view.sort((a, b) => order(a, b) || a.i - b.i);
    view.forEach((row) => { row.band = 0; });
    // what belongs together stands together, in the order of its first
    if (!only && (state.show === "alike" || state.show === "again")) {
      const together = new Map();
      for (const row of view) {
        const key = state.show === "alike" ? row.group : row.caption;
        if (together.has(key)) together.get(key).push(row); else together.set(key, [row]);
      }
      const parts = [...together.values()];
      if (state.show === "again" && state.sort === "run") parts.sort((a, b) => b.length - a.length);
      parts.forEach((part, n) => part.forEach((row) => { row.band = n % 2; }));
      view = parts.flat();
    }
    view.forEach((row, at) => { row.at = at; });
    $("count").textContent = !whole ? "Reading … " + number(rows.length)
      : view.length === rows.length ? "All " + number(rows.length) + " shown" : number(view.length) + " of " + number(rows.length) + " shown";
    $("nothing").hidden = view.length > 0 || !whole;
    $("only").hidden = !only;
    if (only) $("only").textContent = "✕ " + only.label;
    place(true);
  }
  function filter() {  // a person asked for others: from the beginning
    const top = sheet.getBoundingClientRect().top + scrollY - (getComputedStyle(tools).position === "sticky" ? tools.offsetHeight : 0) - 60;
    if (scrollY > Math.max(0, top)) scrollTo(0, Math.max(0, top));
    apply();
  }

  // --- the sheet: only what is in sight, and a little more, has elements

  const cards = new Map();  // by row
  let columns = 1, width = 0, height = 0, gap = 0;
  function measure() {
    const style = getComputedStyle(document.documentElement), probe = blank();
    gap = parseFloat(style.getPropertyValue("--gap"));
    probe.style.visibility = "hidden";
    sheet.append(probe);
    height = probe.offsetHeight + gap;
    probe.remove();
    const room = sheet.clientWidth;
    columns = Math.max(1, Math.floor((room + gap) / ((room < 500 ? 150 : 176) + gap)));
    width = (room - gap * (columns - 1)) / columns;
  }
  const blank = () => $("card").content.firstElementChild.cloneNode(true);
  function position(card, at) {
    card.style.width = width + "px";
    card.style.transform = `translate(${(at % columns) * (width + gap)}px, ${Math.floor(at / columns) * height}px)`;
    card.classList.toggle("band", card.row.band === 1);
    card.setAttribute("aria-posinset", at + 1);
    card.setAttribute("aria-setsize", view.length);
  }
  function place(anew) {
    if (anew) {
      measure();
      sheet.style.height = Math.ceil(view.length / columns) * height + "px";
    }
    const top = -sheet.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor((top - innerHeight / 2) / height)) * columns;
    const end = Math.min(view.length, Math.ceil((top + 1.5 * innerHeight) / height) * columns);
    const wanted = new Set(view.slice(first, end));
    // the one with the focus stays, or the keyboard would lose its place
    const focused = document.activeElement.closest?.(".card")?.row;
    if (focused && view[focused.at] === focused) wanted.add(focused);
    for (const [row, card] of cards) {
      if (wanted.has(row)) continue;
      cards.delete(row);
      card.remove();
    }
    const sorted = [...wanted].sort((a, b) => a.at - b.at);
    let before = sheet.firstElementChild;
    for (const row of sorted) {  // in the order of reading, for whoever goes through with Tab
      let card = cards.get(row);
      const fresh = !card;
      if (fresh) cards.set(row, card = fill(blank(), row));
      if (fresh || anew) position(card, row.at);
      if (card === before) before = before.nextElementSibling;
      else if (!card.contains(document.activeElement)) sheet.insertBefore(card, before);
      else { while (before && before !== card) { const next = before.nextElementSibling; sheet.append(before); before = next; } before = card.nextElementSibling; }
    }
    if (shown && cards.get(shown.row) !== lit) update();  // it went out of sight, or came back
  }

  function fill(card, row) {
    const found = preview(row), name = base(row.path), look = card.querySelector(".look"), image = look.firstElementChild;
    card.row = row;
    card.classList.toggle("failed", row.error !== null && !row.caption);
    if (found) {
      image.src = found.picture;
      image.alt = current(row) || name;
    } else {
      image.alt = "";
    }
    look.classList.toggle("none", !found);
    look.setAttribute("aria-label", "Where it looked: " + name);
    card.querySelector(".length").textContent = row.duration === null ? "" : clock(row.duration);
    const link = card.querySelector(".name a");
    link.textContent = name;
    link.title = row.path;
    if (row.link) link.href = row.link;
    card.querySelector(".edit").setAttribute("aria-label", "Edit the caption of " + name);
    card.querySelector(".edit").title = "Edit (E)";
    const flag = card.querySelector(".flag");
    flag.setAttribute("aria-label", "Flag " + name);
    flag.title = "Flag (F)";
    const mark = card.querySelector(".dot");
    mark.hidden = row.sure === null;
    if (row.sure !== null) {
      mark.classList.add(level(row.sure));
      mark.title = WORDS[level(row.sure)];
      card.querySelector(".sure").textContent = Math.round(100 * row.sure) + " %";
    }
    badge(card.querySelector(".alike"), groups.get(row.group)?.length, (n) => n + " alike", "look like this one");
    caption(card);
    return card;
  }
  function badge(button, many, text, title) {
    button.hidden = !(many > 1);
    if (many > 1) {
      button.textContent = text(number(many));
      button.title = `Show all ${number(many)} that ${title}`;
    }
  }

  function caption(card) {
    const row = card.row, box = card.querySelector(".said"), changed = edited(row);
    card.classList.remove("editing");
    card.classList.toggle("edited", changed);
    card.classList.toggle("marked", flagged(row));
    card.querySelector(".flag").setAttribute("aria-pressed", String(flagged(row)));
    card.querySelector(".restore").hidden = !changed;
    badge(card.querySelector(".again"), changed ? 0 : said.get(row.caption)?.length, (n) => "×" + n, "have this caption");
    box.textContent = "";
    if (changed || !row.parts.length) {
      box.append(current(row));
    } else {
      let index = 0;
      row.parts.forEach(([start, ...words], number) => {
        if (number) box.append(" ");
        if (row.parts.length > 1) {
          const time = document.createElement("time");
          time.textContent = clock(start || 0);
          box.append(time);
        }
        for (let k = 0; k < words.length; k += 2) {
          const button = document.createElement("button"), sure = words[k + 1];
          if (k && !words[k].startsWith("'")) box.append(" ");
          button.type = "button";
          button.textContent = words[k];
          button.dataset.word = index;
          button.tabIndex = index ? -1 : 0;
          button.setAttribute("aria-pressed", "false");
          button.title = sure < 0 ? "given, not chosen by the model" : "probability " + sure + " %";
          if (sure < 0) button.className = "given";
          // the power keeps words that are likelier than not nearly clear: few sentences are likely word by word
          else button.style.setProperty("--doubt", (0.62 * (1 - sure / 100) ** 1.7).toFixed(3));
          box.append(button);
          index++;
        }
      });
    }
    if (row.error !== null) {
      const error = document.createElement("p");
      error.className = "error";
      error.textContent = row.error;
      if (current(row)) box.append(error); else box.replaceChildren(error);
    }
  }

  // --- attention: what is pointed at, else what has the focus, else what was clicked

  let hovered = null, focused = null, pinned = null, shown = null, lit;
  const same = (a, b) => a === b || (a && b && a.row === b.row && a.word === b.word);
  function target(element) {
    const button = element.closest?.(".look, .said button"), card = button?.closest(".card");
    return card ? { row: card.row, word: button.dataset.word === undefined ? -1 : Number(button.dataset.word) } : null;
  }
  function update() {
    const next = hovered || focused || pinned;
    for (const button of sheet.querySelectorAll("[aria-pressed=true]:not(.flag)")) button.setAttribute("aria-pressed", "false");
    if (pinned) buttonOf(pinned)?.setAttribute("aria-pressed", "true");
    for (const element of sheet.querySelectorAll(".on")) element.classList.remove("on");
    shown = next;
    const card = lit = shown ? cards.get(shown.row) : undefined, found = card && preview(shown.row);
    $("legend").hidden = !found;
    $("hint").hidden = !!found;
    if (!found) return;
    const word = shown.word < 0 ? null : buttonOf(shown), map = shown.word < 0 ? 0 : 1 + shown.word - found.first;
    const has = map < found.maps && (shown.word < 0 || map > 0);
    word?.classList.add("on");
    $("what").textContent = !found.maps ? "This model has no attention: it cannot show where it looked."
      : !has ? "This word belongs to another part of the video."
        : word ? "“" + word.textContent + "”, " + word.title : "Mean over the words";
    for (const part of $("legend").querySelectorAll("span")) part.hidden = !has;
    if (!has) return;
    $("top").textContent = found.tops[word ? 0 : 1] + "×";
    const look = card.querySelector(".look");
    draw(look.querySelector("canvas"), look.firstElementChild, found, map);
    look.classList.add("on");
  }
  const buttonOf = ({ row, word }) => cards.get(row)?.querySelector(word < 0 ? ".look" : `.said [data-word="${word}"]`);

  // For each pixel along an axis: two cells and the share of the second, or null outside the grid.
  function axis(pixels, low, high, cells) {
    return Array.from({ length: pixels }, (_, i) => {
      const at = ((i + 0.5) / pixels - low) / (high - low) * cells;
      if (at < 0 || at >= cells) return null;
      const between = Math.min(Math.max(at - 0.5, 0), cells - 1), first = Math.floor(between), t = between - first;
      return [first, Math.min(first + 1, cells - 1), 0.5 * t + 0.5 * t * t * (3 - 2 * t)];
    });
  }
  function draw(canvas, image, found, map) {
    const { H, W, width, height, box } = found, heat = bytes(found.heat), offset = map * H * W;
    const across = axis(width, box[0], box[2], W), down = axis(height, box[1], box[3], H);
    const at = (y, x) => heat[offset + y * W + x] / 255;
    canvas.width = width;
    canvas.height = height;
    const scale = Math.min(image.clientWidth / width, image.clientHeight / height);
    canvas.style.width = scale * width + "px";
    canvas.style.height = scale * height + "px";
    const context = canvas.getContext("2d"), pixels = context.createImageData(width, height);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const d = down[y], a = across[x];
        if (!d || !a) continue;
        const upper = at(d[0], a[0]) * (1 - a[2]) + at(d[0], a[1]) * a[2];
        const lower = at(d[1], a[0]) * (1 - a[2]) + at(d[1], a[1]) * a[2];
        const colour = 4 * Math.round((upper * (1 - d[2]) + lower * d[2]) * LAST), to = 4 * (y * width + x);
        for (let c = 0; c < 4; c++) pixels.data[to + c] = ramp[colour + c];
      }
    }
    context.putImageData(pixels, 0, 0);
  }

  sheet.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "mouse") return;
    const found = target(event.target);
    if (same(found, hovered)) return;
    hovered = found;
    update();
  });
  sheet.addEventListener("pointerleave", () => { hovered = null; update(); });
  sheet.addEventListener("focusin", (event) => {
    const found = target(event.target);
    if (found && event.target.matches(":focus-visible")) { focused = found; hovered = null; } else focused = null;
    if (found && found.word >= 0) {
      for (const button of event.target.parentElement.querySelectorAll("button")) button.tabIndex = button === event.target ? 0 : -1;
    }
    update();
  });
  sheet.addEventListener("focusout", () => { focused = null; update(); });

  // --- buttons of a card

  function flag(card) {
    const { row } = card;
    if (!flags.delete(row.path)) flags.add(row.path);
    card.classList.toggle("marked", flagged(row));
    card.querySelector(".flag").setAttribute("aria-pressed", String(flagged(row)));
    keep();
  }
  function edit(card) {
    if (card.classList.contains("editing")) return;
    const { row } = card, box = card.querySelector(".said"), area = document.createElement("textarea");
    if (pinned?.row === row) pinned = null;
    area.value = current(row);
    area.setAttribute("aria-label", "Caption of " + base(row.path));
    area.spellcheck = true;
    box.replaceChildren(area);
    card.classList.add("editing");
    area.focus();
    area.select();
    let ended = false;
    const end = (save, back) => {
      if (ended) return;
      ended = true;
      if (save) {
        const text = area.value.replace(/\s+/g, " ").trim();
        // an empty one is none: the machine's comes back
        if (!text || text === row.caption) edits.delete(row.path); else edits.set(row.path, text);
        keep();
      }
      caption(card);
      if (back) card.querySelector(".edit").focus();
    };
    area.addEventListener("blur", () => end(true, false));
    area.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Escape") end(false, true);
      else if (event.key === "Enter" && !event.isComposing) { event.preventDefault(); end(true, true); }
    });
  }
  function only(label, found) {
    state.only = { label, rows: found };
    filter();
    $("only").focus();
  }
  sheet.addEventListener("click", (event) => {
    const button = event.target.closest("button"), card = event.target.closest(".card");
    if (!button || !card) return;
    const { row } = card;
    if (button.matches(".flag")) flag(card);
    else if (button.matches(".edit")) edit(card);
    else if (button.matches(".restore")) { edits.delete(row.path); keep(); caption(card); card.querySelector(".edit").focus(); }
    else if (button.matches(".alike")) only(number(groups.get(row.group).length) + " that look alike", groups.get(row.group));
    else if (button.matches(".again")) only("said " + number(said.get(row.caption).length) + "×: " + row.caption, said.get(row.caption));
    else {
      const found = target(button);
      pinned = same(found, pinned) ? null : found;
      if (!pinned) focused = null;
      update();
    }
  });

  function go(at) {
    if (at < 0 || at >= view.length) return;
    const row = view[at], top = sheet.getBoundingClientRect().top + scrollY + Math.floor(at / columns) * height;
    const covered = getComputedStyle(tools).position === "sticky" ? tools.offsetHeight + 8 : 8;
    if (top < scrollY + covered) scrollTo(0, top - covered);
    else if (top + height > scrollY + innerHeight - 60) scrollTo(0, top + height - innerHeight + 60);
    place(false);
    cards.get(row)?.querySelector(".look").focus({ preventScroll: true });
  }
  sheet.addEventListener("keydown", (event) => {
    const card = event.target.closest(".card"), found = target(event.target);
    if (!card || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("textarea")) return;
    const { at } = card.row, key = event.key;
    let done = true;
    if (key === "Escape") { pinned = focused = hovered = null; update(); }
    else if (key === "f" || key === "F") flag(card);
    else if (key === "e" || key === "E") edit(card);
    else if (found && found.word >= 0 && (key === "ArrowLeft" || key === "ArrowRight")) {
      buttonOf({ row: card.row, word: found.word + (key === "ArrowLeft" ? -1 : 1) })?.focus();
    } else if (found && key in { ArrowLeft: 0, ArrowRight: 0, ArrowUp: 0, ArrowDown: 0, Home: 0, End: 0 }) {
      go({ ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - columns, ArrowDown: at + columns, Home: 0, End: view.length - 1 }[key]);
    } else done = false;
    if (done) event.preventDefault();
  });

  // --- the tools

  let timer = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(timer);
    sheet.ariaBusy = "true";
    timer = setTimeout(() => {
      sheet.ariaBusy = "false";
      state.terms = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
      filter();
    }, rows.length > 3000 ? 120 : 0);
  });
  tools.addEventListener("submit", (event) => event.preventDefault());
  $("sort").addEventListener("change", () => { state.sort = $("sort").value; filter(); });
  $("show").addEventListener("change", (event) => {
    if (event.target.name !== "show") return;
    state.show = event.target.value;
    state.only = null;
    filter();
  });
  function span(event) {
    let low = Number($("low").value), high = Number($("high").value);
    if (low > high) { if (event.target.id === "low") low = high; else high = low; }
    $("low").value = low;
    $("high").value = high;
    // where both stand at the right end, the lower one must be within reach
    $("low").style.zIndex = low > 50 ? 1 : "";
    $("span").textContent = low + " to " + high + " %";
    Object.assign(state, { low, high });
    histogram();
    filter();
  }
  $("low").addEventListener("input", span);
  $("high").addEventListener("input", span);
  $("only").addEventListener("click", () => { state.only = null; filter(); tools.querySelector("[name=show]:checked").focus(); });
  $("reset").addEventListener("click", () => {
    tools.reset();
    Object.assign(state, { show: "all", sort: $("sort").value, terms: [], low: 0, high: 100, only: null });
    $("span").textContent = "0 to 100 %";
    histogram();
    filter();
    $("search").focus();
  });

  // --- downloads: as captioner writes CSV

  function csv(table) {
    const fields = table.map((line) => line.map((field) => {
      let text = String(field).replace(/[\ud800-\udfff]/gu, (half) => "\\u" + half.charCodeAt(0).toString(16));  // no Unicode
      if (/^'*[=+\-@\t\r]/.test(text)) text = "'" + text;  // a spreadsheet would run it
      return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
    }));
    return new Blob(["\ufeff" + fields.map((line) => line.join(",") + "\n").join("")], { type: "text/csv" });
  }
  // what the machine said: by that, captioner knows a file that it wrote itself
  function words(row) {
    const said = row.parts.map(([, ...words]) => words.filter((_, k) => k % 2 === 0));
    said.slice(0, -1).forEach((part) => { part[part.length - 1] += "."; });
    return said.length ? JSON.stringify(said.flat().map((word) => ({ word }))) : "";
  }
  function download(name, table) {
    const link = document.createElement("a"), url = URL.createObjectURL(csv(table));
    link.href = url;
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  }
  $("save-edited").addEventListener("click", () => {
    download("edited.csv", [["path", "caption", "start", "end", "words"], ...rows.filter(edited).map((row) =>
      [row.path, current(row), row.duration === null ? "" : 0, row.duration ?? "", words(row)])]);
    due = false;
    tally();
  });
  $("save-flagged").addEventListener("click", () => {
    download("flagged.csv", [["path", "caption", "confidence"],
      ...rows.filter(flagged).map((row) => [row.path, current(row), row.sure ?? ""])]);
  });

  let waiting = 0;
  addEventListener("scroll", () => {
    if (!waiting) waiting = requestAnimationFrame(() => { waiting = 0; place(false); });
  }, { passive: true });
  let wide = 0;
  new ResizeObserver(() => {
    if (sheet.clientWidth !== wide) { wide = sheet.clientWidth; place(true); update(); }
  }).observe(sheet);
  addEventListener("resize", () => place(false));
  // a form that the browser filled in again on going back
  tools.reset();
  more();
})();
