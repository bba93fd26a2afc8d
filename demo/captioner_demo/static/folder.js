// The folder tab: files go up one by one, rows come down in the feed (captioner_demo/folder.py), the table fills.
(function () {
  if (!window.captioner || window.captioner.folderIntake) return;
  const UPLOADS = 3; // at a time
  let token = "", busy = false, abort = null, list = null;

  function address() {
    const config = window.gradio_config || {};
    return (config.root || "").replace(/\/$/, "") + (config.api_prefix || "/gradio_api") + "/upload";
  }

  async function upload(file) {
    const form = new FormData();
    form.append("files", file, file.name);
    const answer = await fetch(address(), { method: "POST", body: form, signal: abort.signal });
    if (answer.status === 413) return { why: "big" };
    if (!answer.ok) return { why: "upload" };
    return { path: (await answer.json())[0] };
  }

  function refusal(file, most) {
    if (file.type.startsWith("video/")) return "video";
    if (file.type && !file.type.startsWith("image/") && file.type !== "application/octet-stream") return "kind";
    return file.size > most ? "big" : "";
  }

  // Files and folders that were dropped, with the folders in their names.
  async function dropped(transfer) {
    // both must be asked for before the event is over
    const files = Array.from(transfer.files, (file) => ({ file: file, name: file.name }));
    const entries = Array.from(transfer.items, (item) => item.webkitGetAsEntry && item.webkitGetAsEntry());
    if (!entries.some(Boolean)) return files;
    const found = [];
    async function walk(entry) {
      if (entry.isFile) {
        await new Promise((done) => entry.file(
          (file) => { found.push({ file: file, name: entry.fullPath.replace(/^\//, "") }); done(); }, done));
        return;
      }
      const reader = entry.createReader();
      for (;;) { // a reader gives a hundred at a time
        const part = await new Promise((done) => reader.readEntries(done, () => done([])));
        if (!part.length) return;
        for (const inner of part) await walk(inner);
      }
    }
    for (const entry of entries.filter(Boolean)) await walk(entry);
    return found;
  }

  function folderIntake(element, trigger) {
    const place = () => element.querySelector(".cap-drop");

    function start() {
      busy = true;
      token = crypto.getRandomValues(new Uint32Array(4)).reduce((text, n) => text + n.toString(16).padStart(8, "0"), "");
      abort = new AbortController();
      place().classList.add("cap-busy");
    }

    async function take(found) {
      const most = Number(place().dataset.files), bytes = Number(place().dataset.bytes);
      const room = Number(place().dataset.total);
      found = found.filter((one) => !/(^|\/)(\.[^/]*|thumbs\.db|desktop\.ini)$/i.test(one.name));
      found.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
      if (busy || !list || !found.length) return;
      const left = found.length - most;
      found = found.slice(0, most);
      start();
      list.begin(token, found.map((one) => one.name), left > 0 ? "The last " + left + " were left out. " : "");
      const files = new Array(found.length);
      let next = 0, total = 0, done = 0;
      async function worker() {
        while (next < found.length && !abort.signal.aborted) {
          const index = next++, one = found[index];
          let fate = { why: refusal(one.file, bytes) };
          if (!fate.why && (total += one.file.size) > room) fate = { why: "total" };
          if (!fate.why) {
            try { fate = await upload(one.file); } catch (error) { fate = { why: "upload" }; }
          }
          // the gate of the server looks at what has an orig_name
          files[index] = Object.assign({ name: one.name, orig_name: one.name }, fate);
          done += 1;
          list.say("Uploading " + done + " of " + found.length, done / found.length);
        }
      }
      await Promise.all(Array.from({ length: UPLOADS }, worker));
      if (abort.signal.aborted) { ended(); return; }
      list.say("Waiting for the model", null);
      trigger("submit", { token: token, files: files });
    }

    element.addEventListener("change", function (event) {
      const input = event.target;
      if (!input.files || !input.files.length) return;
      const found = Array.from(input.files, (file) => ({ file: file, name: file.webkitRelativePath || file.name }));
      input.value = ""; // the same files may be chosen again
      take(found);
    });
    element.addEventListener("click", function (event) {
      if (busy || !event.target.closest("[data-choose=examples]")) return;
      start();
      list.begin(token, [], "");
      trigger("submit", { token: token, examples: true });
    });
    element.addEventListener("dragover", function (event) {
      event.preventDefault();
      place().classList.add("cap-over");
    });
    element.addEventListener("dragleave", () => place().classList.remove("cap-over"));
    element.addEventListener("drop", function (event) {
      event.preventDefault();
      event.stopPropagation();
      place().classList.remove("cap-over");
      dropped(event.dataTransfer).then(take);
    });
    stopping = () => trigger("stop", { stop: token });
  }

  let stopping = () => {};

  // The run is over, whatever became of it.
  function ended() {
    busy = false;
    document.querySelectorAll(".cap-drop.cap-busy").forEach((place) => place.classList.remove("cap-busy"));
    if (list) list.end();
  }

  // ---------------------------------------------------------------------------------------------------

  function add(parent, name, text, kind) {
    const element = document.createElement(name);
    if (text) element.textContent = text;
    if (kind) element.className = kind;
    parent.appendChild(element);
    return element;
  }

  function folderTable(element, trigger) {
    const find = (selector) => element.querySelector(selector);
    const rows = () => Array.from(find("tbody").children);
    let run = "", first = "", seen = 0, done = 0, bad = 0, last = -1, step = "", was = false, note = "", fate = "";

    function row(body, index, path) {
      const line = add(body, "tr", "", "cap-waiting");
      line.dataset.row = index;
      add(line, "td", "", "cap-thumb");
      const cell = add(line, "th", "", "cap-said");
      cell.scope = "row";
      const cut = path.lastIndexOf("/");
      add(cell, "span", "waiting", "cap-state");
      name(cell, path.slice(cut + 1), path.slice(0, Math.max(cut, 0)));
      add(line, "td", "", "cap-how");
    }

    function name(cell, text, folder) {
      const small = add(cell, "small");
      if (folder) add(small, "span", folder + "/", "cap-dir");
      small.appendChild(document.createTextNode(text));
    }

    function begin(token, names, told) {
      run = token;
      mark("busy");
      first = "";
      seen = done = bad = 0;
      last = -1;
      if (told !== undefined) note = told;
      const body = document.createElement("tbody");
      names.forEach((path, index) => row(body, index, path));
      find("tbody").replaceWith(body);
      find(".cap-folder").hidden = false;
      const button = find("[data-do=stop]");
      button.hidden = false;
      button.disabled = false;
      find("progress").hidden = false;
      find("[role=status]").textContent = names.length ? names.length + (names.length === 1 ? " photo" : " photos") : "";
      say("", 0);
    }

    function say(text, share) {
      find(".cap-count").textContent = note + text;
      if (share === null) find("progress").removeAttribute("value");
      else find("progress").value = share;
    }

    // Show what became of a file; the same row may come again when its caption was changed.
    function put(item) {
      const line = rows()[item.row];
      if (!line) return;
      if (line.className === "cap-waiting") { done += 1; bad += item.reason ? 1 : 0; }
      line.textContent = "";
      line.className = item.reason ? "cap-bad" : "cap-done";
      const thumb = add(line, "td", "", "cap-thumb"), cell = add(line, "th", "", "cap-said");
      cell.scope = "row";
      if (item.reason) {
        add(cell, "span", item.reason, "cap-state");
      } else {
        const image = add(thumb, "img");
        image.alt = "";
        image.src = item.thumb;
        const button = add(cell, "button", item.caption);
        button.type = "button";
      }
      name(cell, item.name, item.folder);
      const how = add(line, "td", "", "cap-how");
      if (item.reason) return;
      // a narrow page shows it under the caption; only one of the two is displayed
      for (const place of [how, add(cell, "small", "", "cap-narrow")]) {
        add(place, "i", "", "cap-dot cap-" + item.mark).setAttribute("aria-hidden", "true");
        add(place, "span", item.yours ? "your words" : item.sure.toLowerCase());
      }
    }

    function finish(stopped) {
      rows().filter((line) => line.className === "cap-waiting").forEach(function (line) {
        line.querySelector(".cap-state").textContent = "left out: it was stopped before";
        line.className = "cap-left";
      });
      const good = done - bad, count = rows().length;
      const text = (stopped ? "Stopped: " : "") + good + " of " + count + (count === 1 ? " photo" : " photos") +
        " captioned" + (bad ? ", " + bad + " could not be" : "");
      say(text, 1);
      find("progress").hidden = true;
      find("[role=status]").textContent = note + text;
      find("[data-do=stop]").hidden = true;
      fate = stopped ? "stopped" : "done";
    }

    function end() {
      if (!find("[data-do=stop]").hidden) finish(true); // the feed did not say so
      mark(fate);
    }

    // For who watches the page from outside: which run it shows, and whether the server has done with it.
    function mark(state) {
      Object.assign(find(".cap-folder").dataset, { run: run, state: state });
    }

    function fed() {
      const items = Array.from(document.querySelectorAll("#folder-feed [data-item]"), (one) => one.dataset.item);
      if (!items.length) return;
      const head = JSON.parse(items[0]);
      if (head.run !== run) return; // Gradio may draw the feed of the run before once more
      if (items[0] !== first) {
        if (head.names && !rows().length) begin(head.run, head.names);
        first = items[0];
        seen = 1;
      }
      for (; seen < items.length; seen++) {
        const item = JSON.parse(items[seen]);
        if (item.end) finish(item.end === "stopped");
        else put(item);
      }
      if (!find("[data-do=stop]").hidden) say("Captioned " + done + " of " + rows().length, done / rows().length);
    }

    // The list gives way to a photo that is opened, and comes back: the keyboard follows.
    function swapped() {
      const open = Boolean(document.querySelector("#folder-view .cap-explorer"));
      if (open !== was) {
        was = open;
        const aim = open ? document.querySelector("#folder-nav [data-step=back]")
          : last >= 0 && rows()[last] && rows()[last].querySelector("button");
        if (aim) {
          aim.focus({ preventScroll: true });
          if (!aim.matches(":focus")) setTimeout(() => aim.focus({ preventScroll: true }), 60);
          (open ? document.querySelector("#folder-nav") : aim).scrollIntoView({ block: open ? "start" : "center" });
        }
      } else if (open && step) {
        const aim = document.querySelector("#folder-nav [data-step=" + step + "]:not([disabled])") ||
          document.querySelector("#folder-nav [data-step=back]");
        if (document.activeElement === document.body) aim.focus({ preventScroll: true });
      }
    }

    element.addEventListener("click", function (event) {
      if (event.target.closest("[data-do=stop]")) {
        event.target.closest("[data-do=stop]").disabled = true;
        if (abort) abort.abort();
        stopping();
        return;
      }
      const line = event.target.closest("tr.cap-done");
      if (!line || String(getSelection())) return; // text that is being marked is no click
      last = Number(line.dataset.row);
      trigger("submit", { row: last });
    });
    element.addEventListener("keydown", function (event) {
      const line = event.target.closest("tr.cap-done");
      const way = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!line || !way) return;
      event.preventDefault();
      const all = rows().filter((one) => one.className === "cap-done");
      const aim = all[all.indexOf(line) + way];
      if (aim) aim.querySelector("button").focus();
    });
    const nav = document.getElementById("folder-nav"), view = document.getElementById("folder-view");
    nav.addEventListener("click", function (event) {
      const button = event.target.closest("[data-step]");
      if (!button) return;
      step = button.dataset.step;
      if (Number(button.dataset.pick) >= 0) last = Number(button.dataset.pick);
    });
    new MutationObserver(fed).observe(document.getElementById("folder-feed"),
      { childList: true, subtree: true, attributes: true, attributeFilter: ["data-item"] });
    const look = new MutationObserver(swapped), all = { childList: true, subtree: true, attributes: true };
    look.observe(view, Object.assign({ attributeFilter: ["data-caption"] }, all));
    look.observe(nav, Object.assign({ attributeFilter: ["data-pick"] }, all));
    list = { begin, say, end };
    fed();
  }

  Object.assign(window.captioner, { folderIntake, folderTable, folderEnded: ended });
}());
