"use strict";
// The live tab's camera: one small picture at a time goes to the server, the next when the answer has come.
(function () {
  const shared = window.captioner;
  if (!shared || shared.live) return;
  const PATIENCE = 60000; // ms without an answer after which the camera is stopped
  const BUSY = "The server is busy or cannot be reached; trying again.";
  const STEP = 450; // ms that each word is marked
  let heard = null;
  shared.answered = (answer) => { if (heard) heard(answer); };

  function reason(error) {
    const name = error && error.name;
    if (name === "NotAllowedError" || name === "SecurityError")
      return "The browser does not lend this page the camera. Allow it beside the page's address (and in the " +
        "system's settings), then start again.";
    if (name === "NotFoundError" || name === "OverconstrainedError")
      return "No camera was found. Connect one, then start again.";
    if (name === "NotReadableError" || name === "AbortError")
      return "The camera cannot be used: perhaps another program has it. Close that, then start again.";
    return "The camera cannot be used (" + (error && error.message || name) + ").";
  }

  function insecure() {
    const port = location.port ? ":" + location.port : "";
    return "Browsers lend no camera to a page that came over plain HTTP from another machine. On the machine that " +
      "runs it, open http://localhost" + port + "/; for others, start it with captioner demo --host 0.0.0.0 " +
      "--ssl-certfile cert.pem --ssl-keyfile key.pem and open https://" + location.hostname + port + "/.";
  }

  shared.live = function (element, trigger) {
    const root = element.querySelector(".cap-live");
    if (!root || root.dataset.ready) return;
    root.dataset.ready = "1";
    const settings = JSON.parse(root.dataset.settings), find = (selector) => root.querySelector(selector);
    const video = find("video"), canvas = find("canvas"), sentence = find(".cap-sentence");
    const small = document.createElement("canvas"), hint = find(".cap-card").firstElementChild;
    const still = window.matchMedia("(prefers-reduced-motion: reduce)");
    let stream = null, asking = false, camera = "";
    let turn = 0, waiting = null; // what was sent and has no answer: {first, begun, taken, stop}
    let sending = 0, patience = 0, stepping = 0, last = 0;
    let data = null, shown = -1, pinned = -1, heat = true, hidden = true;
    let delays = [], times = [], spoken = "", spokenAt = 0;

    // --- the camera ----------------------------------------------------------------------------------

    async function start() {
      trouble("");
      if (!window.isSecureContext || !navigator.mediaDevices || !navigator.mediaDevices.getUserMedia) {
        trouble(insecure());
        return;
      }
      asking = true;
      state();
      try {
        const wanted = { width: { ideal: 640 }, height: { ideal: 480 } };
        if (camera) wanted.deviceId = { exact: camera }; else wanted.facingMode = "user";
        const lent = await navigator.mediaDevices.getUserMedia({ audio: false, video: wanted });
        if (!asking) { lent.getTracks().forEach((track) => track.stop()); return; }
        stream = lent;
        const track = lent.getVideoTracks()[0], facts = track.getSettings ? track.getSettings() : {};
        camera = facts.deviceId || camera;
        mirror(facts.facingMode !== "environment");
        track.addEventListener("ended", function () {
          if (stream === lent) { stop(); trouble("The camera was taken away. Connect it, then start again."); }
        });
        video.srcObject = lent;
        await video.play();
        if (stream !== lent) return; // stopped meanwhile
        await cameras();
      } catch (error) {
        if (!asking) return;
        asking = false;
        stop();
        trouble(reason(error));
        return;
      }
      asking = false;
      state();
      size();
      delays = [];
      times = [];
      stepping = stepping || setInterval(step, STEP);
      next();
    }

    function stop() {
      asking = false;
      if (stream) stream.getTracks().forEach((track) => track.stop());
      const had = stream !== null;
      stream = null;
      video.srcObject = null;
      clearTimeout(sending);
      clearInterval(stepping);
      sending = stepping = 0;
      data = null;
      pinned = shown = -1;
      hidden = true;
      sentence.textContent = "";
      find(".cap-sure").hidden = find(".cap-legend").hidden = true;
      find(".cap-rate").textContent = "";
      mark();
      state();
      if (had && !waiting) send({ stop: true });
    }

    async function cameras() {
      const all = (await navigator.mediaDevices.enumerateDevices()).filter((one) => one.kind === "videoinput");
      find("[data-do=other]").hidden = all.length < 2;
      return all;
    }

    async function other() {
      const all = await cameras(), at = all.findIndex((one) => one.deviceId === camera);
      camera = all.length ? all[(at + 1) % all.length].deviceId : "";
      stop();
      start();
    }

    function mirror(on) {
      find(".cap-view").classList.toggle("cap-mirror", on);
      find("[data-do=mirror]").setAttribute("aria-pressed", String(on));
    }

    function state() {
      const on = Boolean(stream), button = find("[data-do=start]");
      root.dataset.state = asking ? "asking" : on ? "on" : "off";
      button.textContent = asking ? "Asking for the camera …" : on ? "Stop" : "Start the camera";
      if (!on) find("[data-do=other]").hidden = true;
    }

    function size() {
      const w = video.videoWidth, h = video.videoHeight, view = find(".cap-view");
      if (!w || (view.style.getPropertyValue("--w") === String(w) && view.style.getPropertyValue("--h") === String(h)))
        return;
      view.style.setProperty("--w", w);
      view.style.setProperty("--h", h);
      shared.fit(canvas, w, h);
    }

    function trouble(text) {
      const line = find(".cap-trouble");
      line.hidden = !text;
      line.textContent = text;
    }

    // --- to the server and back ----------------------------------------------------------------------

    // Gradio does not tell that a request was refused. So it is made again after a while; Gradio passes over
    // what is asked while an earlier request of this component is under way: there are never two.
    function send(message) {
      turn += 1;
      waiting = { first: turn, begun: performance.now(), taken: performance.now(), stop: Boolean(message.stop) };
      request(message);
    }

    function request(message) {
      clearTimeout(patience);
      patience = setTimeout(function () {
        if (!stream && !waiting.stop) message = { stop: true };
        if (performance.now() - waiting.begun > PATIENCE || !stream) {
          waiting = null;
          if (!stream) return;
          stop();
          trouble("The server does not answer. Start again when it does.");
          return;
        }
        trouble(BUSY);
        turn += 1;
        if (!message.stop) message = { picture: picture() };
        request(message);
      }, 1000 * settings.again);
      trigger("submit", Object.assign({ turn: turn }, message));
    }

    function next(pause) {
      clearTimeout(sending);
      if (!stream || waiting) return;
      const rest = Math.max(pause || 0, last + 1000 * settings.every - performance.now());
      sending = setTimeout(take, Math.max(rest, 0));
    }

    function take() {
      if (!stream || waiting || document.hidden) return; // goes on when the page is seen again
      if (!root.getClientRects().length) { stop(); return; } // another tab: the camera's light goes out
      if (!video.videoWidth) { next(100); return; }
      size();
      last = performance.now();
      send({ picture: picture() });
    }

    function picture() { // as the camera gives it, never mirrored
      const factor = Math.min(1, settings.side / Math.max(video.videoWidth, video.videoHeight));
      small.width = Math.max(1, Math.round(video.videoWidth * factor));
      small.height = Math.max(1, Math.round(video.videoHeight * factor));
      small.getContext("2d").drawImage(video, 0, 0, small.width, small.height);
      return small.toDataURL("image/jpeg", 0.85).split(",")[1];
    }

    heard = function (answer) {
      if (!waiting) return;
      const sent = waiting, now = performance.now();
      waiting = null;
      clearTimeout(patience);
      if (!stream) {
        if (!sent.stop) send({ stop: true });
        return;
      }
      if (!answer || !(answer.turn >= sent.first)) { // an old one: the server had trouble with the new one
        trouble(BUSY);
        next(5000);
        return;
      }
      if (answer.error) {
        stop();
        trouble(answer.error.charAt(0).toUpperCase() + answer.error.slice(1) + ".");
        return;
      }
      if (answer.words) {
        trouble("");
        delays = delays.concat(now - sent.taken).slice(-12);
        times = times.concat(now).slice(-12);
        show(answer);
      }
      next();
    };

    // --- what is shown -------------------------------------------------------------------------------

    function show(answer) {
      const before = data, same = before && before.text === answer.text;
      const kept = pinned >= 0 ? before.words[pinned].word : null;
      data = answer;
      fill();
      if (kept !== null) {
        const here = data.words[pinned] && data.words[pinned].word === kept;
        pinned = here ? pinned : data.words.findIndex((word) => word.word === kept);
        if (pinned >= 0) shown = pinned;
      }
      if (!same && pinned < 0) shown = still.matches ? -1 : 0;
      hidden = false;
      mark();
      const sure = find(".cap-sure");
      sure.hidden = false;
      sure.className = "cap-sure cap-" + answer.mark;
      sure.lastElementChild.textContent = answer.sure;
      find(".cap-legend").hidden = !data.words.some((word) => word.attention);
      find(".cap-top").textContent = Number(answer.top.toPrecision(3)) + "× that";
      video.setAttribute("aria-label", "Preview of the camera: " + answer.text);
      rate();
      speak(answer.text);
      root.dataset.count = Number(root.dataset.count || 0) + 1;
      root.dataset.frames = answer.frames;
    }

    function fill() { // buttons that stay keep the keyboard's focus
      const old = Array.from(sentence.querySelectorAll(".cap-word"));
      data.words.forEach(function (word, index) {
        let button = old[index];
        if (!button) {
          button = document.createElement("button");
          button.type = "button";
          button.className = "cap-word";
          button.dataset.word = index;
          sentence.append(" ", button);
        }
        const space = index === 0 || word.word.startsWith("'") ? "" : " ";
        if (button.previousSibling.data !== space) button.previousSibling.data = space;
        if (button.textContent !== word.word) button.textContent = word.word;
        button.title = "probability " + shared.percent(word.p);
        button.style.setProperty("--doubt", Math.pow(1 - Math.min(Math.max(word.p, 0), 1), 1.7).toFixed(3));
      });
      old.slice(data.words.length).forEach(function (button) {
        button.previousSibling.remove();
        button.remove();
      });
    }

    function mark() {
      sentence.querySelectorAll(".cap-word").forEach(function (button, index) {
        button.classList.toggle("cap-on", index === shown);
        button.setAttribute("aria-pressed", String(index === pinned));
      });
      if (pinned >= 0) shared.describe(find(".cap-card"), data.words[pinned], false);
      else if (!hint.isConnected) find(".cap-card").replaceChildren(hint);
      paint();
    }

    function paint() {
      const word = data && shown >= 0 ? data.words[shown] : null;
      const visible = Boolean(word && word.attention && heat && !hidden);
      find(".cap-view").classList.toggle("cap-on", visible);
      root.dataset.shown = visible ? shown : "";
      if (visible) shared.heat(canvas, word.attention, data, true);
    }

    function step() {
      if (!data || pinned >= 0 || still.matches || !data.words.length) return;
      shown = (shown + 1) % data.words.length;
      mark();
    }

    function pin(index) {
      pinned = pinned === index ? -1 : index;
      shown = index;
      mark();
    }

    function rate() {
      const middle = (list) => list.slice().sort((a, b) => a - b)[Math.floor(list.length / 2)];
      const gaps = times.slice(1).map((time, i) => time - times[i]);
      root.dataset.delay = Math.round(middle(delays));
      const behind = (middle(delays) / 1000).toFixed(1) + " s behind the camera";
      find(".cap-rate").textContent = !gaps.length ? behind :
        (1000 / middle(gaps)).toFixed(1) + " captions a second, " + behind + ", from " +
        (data.frames === 1 ? "one frame" : data.frames + " frames");
    }

    function speak(text) { // a screen reader is told what is new, and not more often than it can say
      const now = performance.now();
      if (text === spoken || now - spokenAt < 4000) return;
      spoken = text;
      spokenAt = now;
      find(".cap-sr").textContent = text;
    }

    // --- events --------------------------------------------------------------------------------------

    root.addEventListener("click", function (event) {
      const button = event.target.closest("button");
      if (!button) return;
      const action = button.dataset.do;
      if (button.matches(".cap-word")) pin(Number(button.dataset.word));
      else if (action === "start" && (stream || asking)) stop();
      else if (action === "start") start();
      else if (action === "mirror") mirror(button.getAttribute("aria-pressed") !== "true");
      else if (action === "other") other();
      else if (action === "heat") {
        heat = !heat;
        button.setAttribute("aria-pressed", String(heat));
        paint();
      }
    });
    document.addEventListener("visibilitychange", () => { if (!document.hidden) next(); });
    video.addEventListener("resize", size);
  };
}());
