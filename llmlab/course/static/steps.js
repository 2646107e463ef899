var here = document.currentScript;
var roots = here ? [here.closest(".llmlab-steps")] : document.querySelectorAll(".llmlab-steps");
roots.forEach(function (root) {
  if (root && !root.dataset.ready) stepper(root);
});

// Makes an element: make("button", {type: "button"}, [children])
function make(name, attributes, children) {
  var svg = /^(svg|g|rect|text|line|path|polygon|circle)$/.test(name);
  var element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (var key in attributes || {}) {
    if (attributes[key] !== undefined) element.setAttribute(key, attributes[key]);
  }
  [].concat(children === undefined ? [] : children).forEach(function (child) {
    element.append(child);
  });
  return element;
}

function stepper(root) {
  root.dataset.ready = "1";
  var data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
  var traces = data.traces.map(function (trace) {
    if (!trace.plan) return trace;
    var original = trace.plan.lists;
    var made = llmlabPipeline(trace.plan);
    made.name = trace.name;
    made.plan = trace.plan;
    made.original = original;
    made.first = made.before = made.result;
    made.history = [];
    made.chosen = [0, 0];
    return made;
  });
  var calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  var which = 0, k = 0, timer = null, looked = null, forward = false;

  // The frame: picture, facts, buttons, sentence, the mark that is looked at, editor
  var named = data.title ? data.title + ". " : "";
  var choice = make("div", { class: "s-choice", role: "group", "aria-label": "What to play" });
  var stage = make("div", {
    class: "s-stage", tabindex: "0", role: "group",
    "aria-label": named + "Picture. Left and right step, space plays, up and down look at single marks."
  });
  var facts = make("p", { class: "s-facts" });
  var first = button("First step", "M4 4h2v12H4zM16 4v12L7 10z");
  var back = button("One step back", "M14 4v12L5 10z");
  var play = button("Play", "M6 4v12l10-6z");
  var on = button("One step forward", "M6 4v12l9-6z");
  var last = button("Last step", "M14 4h2v12h-2zM4 4v12l9-6z");
  play.classList.add("s-play");
  var scrub = make("input", { type: "range", min: "0", step: "1", "aria-label": "Step", autocomplete: "off" });
  var count = make("output", { class: "s-count" });
  var bar = make("div", { class: "s-bar" }, [first, back, play, on, last, scrub, count]);
  var alt = root.querySelector(".s-alt");
  alt.setAttribute("aria-live", "polite");
  var value = make("span"), line = make("code");
  var look = make("p", { class: "s-look" }, [value, line]);
  var edit = make("div", { class: "s-edit" });
  [choice, stage, facts, bar].forEach(function (part) { root.insertBefore(part, alt); });
  alt.after(look, edit);

  function button(label, path) {
    var icon = make("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" }, make("path", { d: path }));
    return make("button", { type: "button", class: "s-button", "aria-label": label, title: label }, icon);
  }

  // What is there at step k: the marks of all steps so far, the newest of each id
  function standing(trace) {
    var found = new Map();
    trace.steps.slice(0, k + 1).forEach(function (step) {
      (step.gone || []).forEach(function (id) { found.delete(id); });
      (step.marks || []).forEach(function (mark) { found.set(mark.id, mark); });
    });
    return found;
  }

  function draw() {
    var trace = traces[which], step = trace.steps[k], marks = standing(trace), end = trace.steps.length - 1;
    var fresh = {};
    (step.marks || []).forEach(function (mark) { fresh[mark.id] = true; });
    var width = Math.max(stage.clientWidth || 0, 320);
    var svg = trace.scene.lanes ? lanes(trace, step, marks, fresh, width) : plane(trace, marks, fresh, width);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", step.alt);
    svg.classList.toggle("s-moving", forward && !calm.matches);
    stage.replaceChildren(svg);
    alt.textContent = step.alt;
    alt.classList.toggle("s-fault", trace.stop === k);
    facts.replaceChildren.apply(facts, Object.keys(step.facts || {}).map(function (name) {
      return make("span", {}, [name + " ", make("b", {}, step.facts[name])]);
    }));
    scrub.max = end;
    scrub.value = k;
    scrub.setAttribute("aria-valuetext", "step " + k + " of " + end);
    count.textContent = k + " / " + end;
    [first, back].forEach(function (each) { each.setAttribute("aria-disabled", k === 0); });
    [on, last].forEach(function (each) { each.setAttribute("aria-disabled", k === end); });
    show(marks, step);
  }

  // The mark that is looked at, or else the newest
  function show(marks, step) {
    var mark = looked && marks.get(looked);
    if (!mark) {
      looked = null;
      var those = (step.marks || []).filter(function (each) { return each.value; });
      mark = those[those.length - 1];
    }
    look.setAttribute("aria-live", looked ? "polite" : "off");
    value.textContent = mark && looked ? mark.value : "";
    line.textContent = (mark && mark.line) || "";
    stage.querySelectorAll(".s-looked").forEach(function (each) { each.classList.remove("s-looked"); });
    if (looked) stage.querySelector("[data-id='" + looked + "']").classList.add("s-looked");
  }

  // Lanes over time
  function lanes(trace, step, marks, fresh, width) {
    var left = 30, right = width < 420 ? 88 : 96, top = 24, row = 36, scene = trace.scene;
    var until = Math.max(scene.until, trace.first ? trace.first.time : 0);
    var height = top + row * scene.lanes + 26, scale = (width - left - right) / (until || 1);
    var svg = make("svg", { width: width, height: height, viewBox: "0 0 " + width + " " + height });
    var sides = step.sides || [], most = 1;
    trace.steps[trace.steps.length - 1].sides.forEach(function (side) { most = Math.max(most, side[1]); });
    legend(svg, trace, left + 12, width - right);
    svg.append(label(2, 15, "rank", "s-small"), label(width - right + 10, 15, "holds / most", "s-small"));
    for (var lane = 0; lane < scene.lanes; lane++) {
      var y = top + row * lane;
      svg.append(make("rect", { x: left, y: y + 2, width: width - left - right, height: row - 4, class: "s-lane" }));
      svg.append(label(14, y + row / 2 + 5, String(lane), "s-middle"));
      if (!sides[lane]) continue;
      var x = width - right + 10, unit = (right - 14) / most;
      svg.append(make("rect", { x: x, y: y + 22, width: unit * sides[lane][1], height: 8, class: "s-most" }));
      svg.append(make("rect", { x: x, y: y + 22, width: unit * sides[lane][0], height: 8, class: "s-now" }));
      svg.append(label(x, y + 17, short(sides[lane][0]) + " / " + short(sides[lane][1]), "s-number"));
    }
    var every = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500].find(function (each) { return each * scale >= 44; }) || 1000;
    for (var t = 0; t <= until + 1e-9; t += every) {
      svg.append(make("line", { x1: left + t * scale, x2: left + t * scale, y1: height - 26, y2: height - 21, class: "s-tick" }));
      svg.append(label(left + t * scale, height - 7, short(t), "s-small s-middle"));
    }
    marks.forEach(function (mark) {
      var x = left + mark.at[0] * scale, w = (mark.at[1] - mark.at[0]) * scale, y = top + row * mark.at[2] + 4;
      var g = group(mark, fresh);
      g.append(make("rect", { x: x + 0.5, y: y, width: Math.max(w - 1, 1), height: row - 8, rx: Math.min(3, w / 4) }));
      if (w > 7.5 * mark.text.length + 1) g.append(label(x + w / 2, y + 19, mark.text, "s-middle"));
      svg.append(g);
    });
    var old = trace.before, both = old && !old.stuck.length && !trace.result.stuck.length;
    if (both && old.time !== trace.result.time && old.time <= until) {
      var at = left + old.time * scale;
      svg.append(make("line", { x1: at, x2: at, y1: top - 2, y2: height - 26, class: "s-before" }));
      svg.append(label(at - 4, 15, "before", "s-small s-end"));
    }
    return svg;
  }

  // The names of the colours, or their letters where there is no room
  function legend(svg, trace, x, until) {
    if (!trace.plan) return;
    var names = { F: "forward", B: "backward", I: "input's gradient", W: "weights' gradient" };
    var used = Object.keys(names).filter(function (kind) {
      return trace.plan.lists.some(function (ops) { return ops.some(function (op) { return op[0] === kind; }); });
    });
    var room = until - x > 340;
    used.forEach(function (kind) {
      var colour = { F: "blue", B: "orange", I: "orange", W: "green" }[kind];
      var text = kind + (room || used.length < 3 ? " " + names[kind] : "");
      var g = make("g", { class: "s-bars k-" + colour });
      g.append(make("rect", { x: x, y: 5, width: 11, height: 11, rx: 2 }));
      svg.append(g, label(x + 16, 15, text, "s-small"));
      x += 34 + 6.2 * text.length;
    });
  }

  // A plane of pixels: boxes, cells, arrows that carry cells
  function plane(trace, marks, fresh, width) {
    var scene = trace.scene, zoom = Math.min(1.3, Math.max(width / scene.width, 0.92));
    var svg = make("svg", {
      width: scene.width * zoom, height: scene.height * zoom, viewBox: "0 0 " + scene.width + " " + scene.height
    });
    ["box", "cell", "arrow"].forEach(function (shape) {
      marks.forEach(function (mark) {
        if (mark.shape === shape) svg.append(shapes[shape](mark, fresh, scene));
      });
    });
    return svg;
  }
  var shapes = {
    box: function (mark, fresh) {
      var g = group(mark, {}), at = mark.at;
      g.append(make("rect", { x: at[0], y: at[1], width: at[2], height: at[3], rx: 7, class: "s-box" }));
      if (mark.parts) {
        g.append(make("rect", { x: at[0] + 8, y: at[1] + 6, width: 10, height: 10, rx: 2, class: "s-rank" + mark.parts[0] }));
      }
      g.append(label(at[0] + 23, at[1] + 15, mark.text, "s-small"));
      return g;
    },
    cell: function (mark, fresh) {
      var g = group(mark, fresh);
      cell(g, mark, mark.at[0] + 1, mark.at[1] + 1, mark.at[2] - 2, mark.at[3] - 2);
      return g;
    },
    arrow: function (mark, fresh, scene) {
      var g = group(mark, fresh), at = mark.at;
      var dx = at[2] - at[0], dy = at[3] - at[1], length = Math.hypot(dx, dy);
      var ux = dx / length, uy = dy / length, hx = at[2] - 9 * ux, hy = at[3] - 9 * uy;
      g.append(make("line", { x1: at[0], y1: at[1], x2: hx, y2: hy }));
      g.append(make("polygon", {
        points: [at[2], at[3], hx - 5 * uy, hy + 5 * ux, hx + 5 * uy, hy - 5 * ux].join(" ")
      }));
      var w = Math.max(scene.cell[0] - 2, 9 * mark.text.length + 8), h = scene.cell[1] - 2;
      var x = at[0] + 0.42 * dx, y = at[1] + 0.42 * dy;
      var chip = make("g", { class: "s-chip", style: "--dx:" + -0.42 * dx + "px;--dy:" + -0.42 * dy + "px" });
      cell(chip, mark, x - w / 2, y - h / 2, w, h);
      g.append(chip);
      return g;
    }
  };
  function cell(g, mark, x, y, w, h) {
    var parts = mark.parts || [], unit = (w - 6) / parts.length;
    g.append(make("rect", { x: x, y: y, width: w, height: h, rx: 4, class: "s-cell" }));
    g.append(label(x + w / 2, y + 15, mark.text, "s-middle"));
    parts.forEach(function (times, rank) {
      var slot = { x: x + 3 + unit * rank, y: y + h - 11, width: unit - 1, height: 7 };
      slot.class = times ? "s-rank" + rank : "s-empty";
      g.append(make("rect", slot));
      if (times > 1) {
        g.append(make("rect", { x: slot.x - 0.5, y: slot.y - 1, width: slot.width + 1, height: 9, class: "s-twice" }));
      }
    });
  }
  function group(mark, fresh) {
    var kind = "s-mark s-" + mark.shape + "s k-" + (mark.kind || "plain") + (fresh[mark.id] ? " s-fresh" : "");
    return make("g", { class: kind, "data-id": mark.id });
  }
  function label(x, y, text, kind) { return make("text", { x: x, y: y, class: kind || "" }, text); }
  function short(x) { return String(Math.floor(x * 100 + 0.5) / 100); }

  // Moving through the steps
  function to(step, isForward) {
    var end = traces[which].steps.length - 1;
    k = Math.max(0, Math.min(end, step));
    forward = Boolean(isForward);
    looked = null;
    draw();
  }
  function pause() {
    clearInterval(timer);
    timer = null;
    alt.setAttribute("aria-live", "polite");
    play.setAttribute("aria-label", "Play");
    play.title = "Play";
    play.querySelector("path").setAttribute("d", "M6 4v12l10-6z");
  }
  function toggle() {
    if (timer) { pause(); return; }
    var trace = traces[which], end = trace.steps.length - 1;
    if (k === end || k === trace.stop) to(k === end ? 0 : k + 1, true);
    // Thirty sentences in a row help nobody: only where it stops is announced.
    alt.setAttribute("aria-live", "off");
    play.setAttribute("aria-label", "Pause");
    play.title = "Pause";
    play.querySelector("path").setAttribute("d", "M5 4h4v12H5zM11 4h4v12h-4z");
    timer = setInterval(function () {
      if (k + 1 >= end || k + 1 === trace.stop) pause();
      to(k + 1, true);
    }, Math.max(170, Math.min(1300, 16000 / end)));
  }
  function step(by) { pause(); to(k + by, by > 0); }
  function jump(there) { pause(); to(there); }
  first.addEventListener("click", function () { jump(0); });
  back.addEventListener("click", function () { step(-1); });
  play.addEventListener("click", toggle);
  on.addEventListener("click", function () { step(1); });
  last.addEventListener("click", function () { jump(1e9); });
  scrub.addEventListener("input", function () { jump(+scrub.value); });

  // Looking at marks
  function at(event) {
    var g = event.target.closest && event.target.closest(".s-mark");
    return g && standing(traces[which]).get(g.dataset.id).value ? g.dataset.id : null;
  }
  function lookAt(id) {
    looked = id;
    show(standing(traces[which]), traces[which].steps[k]);
  }
  function lookOn(by) {
    var marks = standing(traces[which]), ids = [];
    marks.forEach(function (mark, id) { if (mark.value) ids.push(id); });
    if (!ids.length) return;
    var now = ids.indexOf(looked);
    lookAt(ids[now < 0 ? (by > 0 ? 0 : ids.length - 1) : (now + by + ids.length) % ids.length]);
  }
  stage.addEventListener("pointerover", function (event) { if (at(event)) lookAt(at(event)); });
  stage.addEventListener("pointerleave", function () { lookAt(null); });
  stage.addEventListener("click", function (event) {
    var id = at(event), trace = traces[which];
    if (!id) return;
    lookAt(id);
    if (trace.plan && trace.plan.edit) choose(id);
  });

  root.addEventListener("keydown", function (event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    var key = event.key, target = event.target, range = target === scrub;
    if (target.closest(".s-edit") || (target.closest(".s-choice") && key === " ")) return;
    var done = true;
    if (key === " " && (range || target === stage)) toggle();
    else if (key === "ArrowRight") step(1);
    else if (key === "ArrowLeft") step(-1);
    else if (key === "Home") jump(0);
    else if (key === "End") jump(1e9);
    else if (key === "ArrowDown" && !range) lookOn(1);
    else if (key === "ArrowUp" && !range) lookOn(-1);
    else if (key === "Escape" && looked) lookAt(null);
    else done = false;
    if (done) event.preventDefault();
  });

  // Which trace is played
  function choosing() {
    choice.hidden = traces.length < 2;
    if (choice.hidden) return;
    traces.forEach(function (trace, i) {
      var each = make("button", { type: "button", "aria-pressed": i === which }, trace.name);
      each.addEventListener("click", function () {
        which = i;
        choice.querySelectorAll("button").forEach(function (other, j) {
          other.setAttribute("aria-pressed", i === j);
        });
        jump(data.start === 0 ? 0 : 1e9);
        editing();
      });
      choice.append(each);
    });
  }

  // The editor: ops are moved within their rank's list
  var rows, said, goal, text;
  function editing() {
    var trace = traces[which];
    edit.hidden = !(trace.plan && trace.plan.edit);
    edit.replaceChildren();
    if (edit.hidden) return;
    rows = make("div", { class: "s-rows" });
    said = make("p", { class: "s-said", role: "status" });
    goal = make("p", { class: "s-goal" });
    text = make("textarea", { readonly: "", rows: "4", hidden: "", "aria-label": "The schedule as Python", spellcheck: "false" });
    var buttons = [
      ["◀ earlier", function () { move(-1); }], ["later ▶", function () { move(1); }],
      ["undo", undo], ["start again", restart], ["as Python", asPython]
    ].map(function (pair) {
      var each = make("button", { type: "button", class: "s-word" }, pair[0]);
      each.addEventListener("click", pair[1]);
      return each;
    });
    edit.append(
      make("p", { class: "s-how" }, "Change the order: choose an op, then move it. With the keyboard: arrows choose, Shift and an arrow move."),
      rows, make("div", { class: "s-words" }, buttons), said, goal, text
    );
    list(false);
    judge();
  }
  function list(focus) {
    var trace = traces[which], stuck = {};
    trace.result.stuck.forEach(function (each) { stuck[each.rank] = each; });
    rows.replaceChildren.apply(rows, trace.plan.lists.map(function (ops, rank) {
      var chips = ops.map(function (op, place) {
        var is = trace.chosen[0] === rank && trace.chosen[1] === place;
        var waits = stuck[rank] && stuck[rank].place === place;
        var colour = { F: "blue", B: "orange", I: "orange", W: "green" }[op[0]];
        var chip = make("button", {
          type: "button", class: "s-op k-" + (op[2] % 2 ? "pale-" : "") + colour + (waits ? " k-stuck" : ""),
          "aria-pressed": is, tabindex: is ? "0" : "-1",
          "aria-label": trace.result.name(op) + ", place " + (place + 1) + " of rank " + rank + (waits ? ", stuck here" : "")
        }, trace.result.name(op));
        chip.addEventListener("click", function () { trace.chosen = [rank, place]; list(true); });
        return chip;
      });
      return make("div", { class: "s-row", role: "group", "aria-label": "rank " + rank }, [make("span", {}, "rank " + rank), make("div", {}, chips)]);
    }));
    if (focus) chosenChip().focus();
  }
  function chosenChip() { return rows.querySelector("[aria-pressed=true]"); }
  function choose(id) {
    var trace = traces[which], rank = +id.split("/")[0], name = id.split("/")[1];
    var place = trace.plan.lists[rank].findIndex(function (op) { return trace.result.name(op) === name; });
    trace.chosen = [rank, place];
    list(false);
  }
  function renew(lists) {
    var trace = traces[which], old = trace.result;
    trace.plan = Object.assign({}, trace.plan, { lists: lists });
    Object.assign(trace, llmlabPipeline(trace.plan));
    trace.before = old;
    if (!text.hidden) text.value = python();
    jump(1e9);
  }
  function move(by) {
    var trace = traces[which], rank = trace.chosen[0], place = trace.chosen[1], to = place + by;
    if (to < 0 || to >= trace.plan.lists[rank].length) {
      said.textContent = "It is the " + (by < 0 ? "first" : "last") + " of its list.";
      return;
    }
    var lists = trace.plan.lists.map(function (ops) { return ops.slice(); });
    var moved = lists[rank][place], other = lists[rank][to];
    lists[rank][place] = other;
    lists[rank][to] = moved;
    trace.history.push(trace.plan.lists);
    trace.chosen = [rank, to];
    var inside = rows.contains(document.activeElement);
    renew(lists);
    list(inside);
    judge("rank " + rank + ": " + trace.result.name(moved) + (by < 0 ? " before " : " after ") + trace.result.name(other) + ". ");
  }
  function undo() {
    var trace = traces[which];
    if (!trace.history.length) { said.textContent = "There is nothing to undo."; return; }
    renew(trace.history.pop());
    list(false);
    judge("Undone. ");
  }
  function restart() {
    var trace = traces[which];
    trace.history = [];
    renew(trace.original);
    trace.before = trace.result;
    list(false);
    draw();
    judge("As it was. ");
  }
  function change(name, before, after) {
    return name + " " + (before === after ? after : before + " → " + after);
  }
  function judge(opening) {
    var trace = traces[which], now = trace.result, old = trace.before, plan = trace.plan;
    function rates(result) { return result.stuck.length ? "–" : Math.floor(100 * result.bubble + 0.5) + "%"; }
    function times(result) { return result.stuck.length ? "–" : short(result.time); }
    function peaks(result) { return result.peaks.map(short).join(", "); }
    if (opening) {
      said.textContent = opening + (trace.fault || [
        change("Time", times(old), times(now)), change("waiting", rates(old), rates(now)), change("at most held", peaks(old), peaks(now))
      ].join("; ") + ".");
      said.classList.toggle("s-fault", Boolean(trace.fault));
    }
    if (!plan.goal_text) return;
    var most = { time: now.time, bubble: now.bubble, peak: Math.max.apply(null, now.peaks) };
    var reached = !now.stuck.length && Object.keys(plan.goal).every(function (name) {
      return most[name] <= plan.goal[name] + 1e-9;
    });
    goal.textContent = (reached ? "✓ Reached: " : "Goal: ") + plan.goal_text + ".";
    goal.classList.toggle("s-reached", reached);
    if (reached && opening) said.textContent += " The goal is reached.";
  }
  function python() {
    return "[" + traces[which].plan.lists.map(function (ops) {
      return "[" + ops.map(function (op) { return "('" + op[0] + "', " + op[1] + ", " + op[2] + ")"; }).join(", ") + "]";
    }).join(",\n ") + "]";
  }
  function asPython() {
    text.hidden = !text.hidden;
    if (text.hidden) return;
    text.value = python();
    text.focus();
    text.select();
    if (navigator.clipboard) navigator.clipboard.writeText(text.value).then(function () {
      said.textContent = "Copied. Paste it into a cell.";
    }, function () {});
  }
  edit.addEventListener("keydown", function (event) {
    if (!event.target.classList.contains("s-op")) return;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    var trace = traces[which], rank = trace.chosen[0], place = trace.chosen[1], lists = trace.plan.lists;
    var by = { ArrowLeft: -1, ArrowRight: 1 }[event.key], down = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (by && event.shiftKey) move(by);
    else if (by) place = Math.max(0, Math.min(lists[rank].length - 1, place + by));
    else if (down) rank = Math.max(0, Math.min(lists.length - 1, rank + down));
    else if (event.key === "Home") place = 0;
    else if (event.key === "End") place = lists[rank].length - 1;
    else return;
    event.preventDefault();
    if (by && event.shiftKey) return;
    trace.chosen = [rank, Math.min(place, lists[rank].length - 1)];
    list(true);
  });

  choosing();
  k = data.start === 0 ? 0 : traces[0].steps.length - 1;
  if (data.start !== 0 && traces[0].stop !== null && traces[0].stop !== undefined) k = traces[0].stop;
  draw();
  editing();
  if (window.ResizeObserver) {
    var width = stage.clientWidth;
    new ResizeObserver(function () {
      if (Math.abs(stage.clientWidth - width) > 1) { width = stage.clientWidth; forward = false; draw(); }
    }).observe(stage);
  }
}
