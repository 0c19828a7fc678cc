// Keeps the page as the run is: asks the server for what changed, and draws the plots that are on the screen.
(() => {
  const token = new URLSearchParams(location.search).get("token") ?? "";
  const SECONDS = 2, HIDDEN_SECONDS = 20, PATIENCE_SECONDS = 30;
  const root = document.documentElement;
  const figures = new Map(); // key -> newest figure of the whole run
  const zoomed = new Map(); // key -> x range that the person looks at
  const undrawn = new Set(); // keys of plots that changed since they were drawn
  let have = "", heard = null, plotly = null, spent = 0, wake = () => {};
  const at = (id) => document.getElementById(id);

  async function ask(path, params = {}) {
    const url = `${path}?${new URLSearchParams({ ...params, token })}`;
    const answer = await fetch(url, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_SECONDS * 1000) });
    if (answer.status === 403) throw new Error("the server there now is another one: open the address that it printed");
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    return answer;
  }

  function say(id, text) {
    at(id).hidden = !text;
    if (at(id).textContent !== text) at(id).textContent = text;
  }

  // --- the head ---

  const known = (value) => value !== null && value !== undefined;

  function count(value) {
    for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
      if (value >= unit) return `${(value / (unit === 1e4 ? 1e3 : unit)).toFixed(unit === 1e4 ? 1 : 2)} ${name}`;
    }
    return value.toFixed(0);
  }

  function span(seconds) {
    if (seconds < 100) return `${Math.round(seconds)} s`;
    const minutes = Math.round(seconds / 60), hours = Math.floor(minutes / 60);
    if (minutes < 100) return `${minutes} min`;
    return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
  }

  const clock = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "medium" });

  function tiles(now) {
    const alive = ["starting", "running", "stalled"].includes(now.state);
    const found = [];
    const add = (name, value, note = "", kind = "", link = "") => found.push({ name, value, note, kind, link });
    const step = (value) => `step ${value.toLocaleString()}`;
    add("state", now.state, known(now.attempt) && now.attempt > 1 ? `attempt ${now.attempt}` : "", now.mood);
    if (known(now.step)) add("step", now.step.toLocaleString(), now.steps ? `of ${now.steps.toLocaleString()}` : "");
    if (known(now.loss)) {
      const finite = typeof now.loss === "number";
      add("loss", finite ? now.loss.toFixed(4) : now.loss, known(now.depth) ? `at r = ${now.depth}` : "", finite ? "" : "bad");
    }
    if (known(now.tokens_per_second)) add("tokens/s", count(now.tokens_per_second));
    if (known(now.seconds_left)) add("time left", span(now.seconds_left));
    if (known(now.goodput)) add("goodput", `${(100 * now.goodput).toFixed(1)} %`);
    if (known(now.checkpoint_age) && known(now.checkpoint_step)) {
      if (alive) add("checkpoint", `${span(now.checkpoint_age)} old`, step(now.checkpoint_step));
      else add("checkpoint", step(now.checkpoint_step));
    }
    if (alive && known(now.step_age)) add("last step", `${span(now.step_age)} ago`, "", now.state === "stalled" ? "bad" : "minor");
    if (alive && known(now.heartbeat_age)) add("heartbeat", `${span(now.heartbeat_age)} ago`, "", now.heartbeat_age > 60 ? "bad" : "minor");
    if (now.incidents) add("incidents", now.incidents.toLocaleString(), now.newest_incident, "", "#details");
    return found;
  }

  function tile({ name, value, note, kind, link }) {
    const found = document.createElement("div"), term = document.createElement("dt"), text = document.createElement("dd");
    const place = link ? Object.assign(document.createElement("a"), { href: link }) : text;
    if (kind) found.className = kind;
    term.textContent = name;
    place.textContent = value;
    if (link) text.append(place);
    if (note) text.append(Object.assign(document.createElement("small"), { textContent: ` ${note}` }));
    found.append(term, text);
    return found;
  }

  function showStanding(now) {
    at("standing").replaceChildren(...tiles(now).map(tile));
    at("detail").textContent = [known(now.since) ? `${now.state} since ${clock(now.since)}` : "", now.detail].filter(Boolean).join(": ");
    at("progress").hidden = !(known(now.step) && now.steps);
    if (now.steps) at("progress").value = (now.step ?? 0) / now.steps;
    at("warnings").hidden = !now.warnings.length;
    at("warnings").replaceChildren(...now.warnings.map((text) =>
      Object.assign(document.createElement("li"), { textContent: text })));
    document.title = `${known(now.step) ? `${now.step.toLocaleString()} ` : ""}${now.state} - ${now.run} - Rookery`;
  }

  function showReading(reading) {
    at("reading").hidden = !reading;
    if (!reading) return;
    const [read, total] = reading, bar = at("reading").querySelector("progress");
    const unit = total >= 1e9 ? [1e9, "GB"] : [1e6, "MB"];
    at("reading").querySelector("span").textContent = total
      ? `Reading ${(read / unit[0]).toFixed(1)} of ${(total / unit[0]).toFixed(1)} ${unit[1]} of the log; shown is what is known so far.`
      : "Reading the log ...";
    if (total) bar.value = read / total;
  }

  // --- the plots ---

  const seen = new Set();
  const eyes = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const key = target.id.slice("plot-".length);
      seen[isIntersecting ? "add" : "delete"](key);
    }
    wakeDrawing();
  }, { rootMargin: "300px" });

  let drawing = null;
  function wakeDrawing() {
    if (plotly && !drawing) drawing = drawSeen().finally(() => { drawing = null; });
  }

  async function drawSeen() {
    for (let key; (key = [...undrawn].find((each) => seen.has(each))) !== undefined;) {
      undrawn.delete(key);
      const began = performance.now();
      await draw(key).catch((error) => say("failure", `The plot ${key} cannot be drawn: ${error.message}.`));
      spent += performance.now() - began;
      await new Promise((resolve) => setTimeout(resolve)); // scrolling comes first
    }
    if (figures.size && root.dataset.plots !== "drawn") {
      root.dataset.plots = "drawn";
      performance.mark("curves");
    }
  }

  async function draw(key) {
    const plot = at(`plot-${key}`), range = zoomed.get(key);
    let figure = figures.get(key);
    if (!plot || !figure) return;
    if (range) {
      try {
        const finer = await (await ask("/zoomed", { key, low: range[0], high: range[1] })).json();
        if (zoomed.get(key) === range && finer.traces.length) figure = finer;
      } catch { /* the coarse one stays; the next poll says whether the server is there */ }
    }
    await plots.react(plot, figure);
    if (figure.axis && !plot.dataset.followed) {
      plot.dataset.followed = "yes";
      plot.on("plotly_relayout", (change) => follow(key, plot, change));
    }
  }

  function follow(key, plot, change) {
    if (change["xaxis.autorange"]) {
      if (zoomed.delete(key)) later(key);
    } else if ("xaxis.range[0]" in change || "xaxis.range" in change) {
      zoomed.set(key, plot.layout.xaxis.range.map(Number));
      later(key);
    }
  }

  function later(key) {
    undrawn.add(key);
    wakeDrawing();
  }

  function take(part) {
    if (!part.traces) return takeText(at(part.key), part.html);
    const section = at(`panel-${part.key}`);
    if (!section) return;
    if (section.dataset.html !== part.html) {
      const template = document.createElement("template");
      template.innerHTML = part.html;
      const fresh = template.content.firstElementChild;
      const plot = fresh.querySelector(".plot"), old = section.querySelector(".plot");
      if (plot && old) plot.replaceWith(old); // what is drawn stays drawn
      fresh.dataset.html = part.html;
      section.replaceWith(fresh);
      if (plot && !old) eyes.observe(plot);
    }
    if (part.traces.length) {
      figures.set(part.key, part);
      undrawn.add(part.key);
    }
  }

  // Tables are replaced whole; what was unfolded or scrolled in them stays so.
  function takeText(element, html) {
    const name = (each) => each.id || each.querySelector(":scope > pre")?.id || each.querySelector("summary").textContent.replace(/[0-9,]+/g, "");
    const open = new Set([...element.querySelectorAll("details[open]")].map(name));
    const scrolled = [...element.querySelectorAll(".scroll, pre")].map((each) => each.scrollTop);
    element.innerHTML = html;
    element.querySelectorAll("details").forEach((each) => { each.open ||= open.has(name(each)); });
    element.querySelectorAll(".scroll, pre").forEach((each, index) => { each.scrollTop = scrolled[index] ?? 0; });
  }

  // --- the conversation ---

  async function look() {
    let answer;
    try {
      answer = await (await ask("/changes", { have })).json();
    } catch (error) {
      const since = heard ? `Lost the server since ${heard.toLocaleTimeString()}` : "The server does not answer";
      const reason = error.name === "TypeError" ? "it ended, or the tunnel to it is closed" : error.message;
      say("lost", `${since}: ${reason}. This page asks again every ${SECONDS} seconds.`);
      root.dataset.lost = "yes";
      if (!document.title.startsWith("lost: ")) document.title = `lost: ${document.title}`;
      return;
    }
    heard = new Date();
    say("lost", "");
    delete root.dataset.lost;
    showStanding(answer.standing);
    showReading(answer.reading);
    say("failure", answer.problem ?? "");
    for (const part of answer.parts) take(part);
    if (answer.parts.length && root.dataset.plots === "waiting") root.dataset.plots = "known";
    have = answer.version;
    wakeDrawing();
  }

  async function follower() {
    for (;;) {
      spent = 0;
      await look().catch((error) => say("failure", `The page cannot be brought up to date: ${error.message}.`));
      if (drawing) await drawing;
      // Drawing takes a third of the time at most, so that the page answers to its person.
      const seconds = document.hidden ? HIDDEN_SECONDS : Math.max(SECONDS, spent / 500);
      await new Promise((resolve) => { wake = resolve; setTimeout(resolve, seconds * 1000); });
    }
  }

  async function start() {
    document.addEventListener("visibilitychange", () => document.hidden || wake());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      for (const key of figures.keys()) undrawn.add(key);
      wakeDrawing();
    });
    document.querySelectorAll(".plot").forEach((plot) => eyes.observe(plot));
    follower();
    try {
      plots.run(await (await ask("/plotly.js")).text());
      plotly = true;
      wakeDrawing();
    } catch (error) {
      say("failure", `The plots cannot be drawn: ${error.message}.`);
    }
  }

  start();
})();
