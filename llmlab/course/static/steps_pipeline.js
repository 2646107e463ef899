// What a pipeline schedule does when, by the rules of llmlab/parallelism/pipeline/timeline.py
// and in the words of llmlab/course/steppers/pipelines.py. A test holds them to each other.
function llmlabPipeline(plan) {
  var lists = plan.lists, costs = plan.costs, p = lists.length, v = 1, m = 0, total = 0;
  lists.forEach(function (ops) {
    total += ops.length;
    ops.forEach(function (op) {
      v = Math.max(v, op[2] + 1);
      m = Math.max(m, op[1] + 1);
    });
  });
  var colours = { F: "blue", B: "orange", I: "orange", W: "green" };
  var holds = { F: 1, B: -1, I: -1, W: 0 };
  var seconds = { F: costs.F, B: costs.I + costs.W, I: costs.I, W: costs.W };

  function number(x) { return String(Math.floor(x * 100 + 0.5) / 100); }
  function percent(x) { return Math.floor(100 * x + 0.5) + "%"; }
  function name(op) {
    return op[0] + op[1] + (v > 1 ? "abcdefghijklmnop".charAt(op[2]) : "");
  }
  function stageOf(rank, chunk) {
    var backwards = plan.layout === "v" && chunk % 2 === 1;
    return chunk * p + (backwards ? p - 1 - rank : rank);
  }
  // The results that an op waits for: [kind, microbatch, stage]
  function needs(op, rank) {
    var stage = stageOf(rank, op[2]);
    if (op[0] === "F") return stage ? [["F", op[1], stage - 1]] : [];
    if (op[0] === "W") return [["I", op[1], stage]];
    var own = ["F", op[1], stage];
    return stage === p * v - 1 ? [own] : [own, ["I", op[1], stage + 1]];
  }

  // Each round lets each rank go as far as it can; a round without progress is the last.
  var next = [], free = [], done = {}, bars = [], r;
  for (r = 0; r < p; r++) { next.push(0); free.push(0); }
  function ready(op, rank) {
    var when = 0;
    for (var result of needs(op, rank)) {
      var made = done[result];
      if (!made) return null;
      when = Math.max(when, made.rank === rank ? made.end : made.end + costs.comm);
    }
    return when;
  }
  function advance(rank) {
    var advanced = false;
    while (next[rank] < lists[rank].length) {
      var op = lists[rank][next[rank]], when = ready(op, rank);
      if (when === null) break;
      var start = Math.max(free[rank], when), end = start + seconds[op[0]] / v;
      var bar = { rank: rank, op: op, place: next[rank], start: start, end: end };
      bars.push(bar);
      done[[op[0] === "B" ? "I" : op[0], op[1], stageOf(rank, op[2])]] = bar;
      free[rank] = end;
      next[rank] += 1;
      advanced = true;
    }
    return advanced;
  }
  for (var going = true; going;) {
    going = false;
    for (r = 0; r < p; r++) going = advance(r) || going;
  }

  // The steps
  var now = [], peak = [], last = [], busy = 0, end = 0, until = 0;
  for (r = 0; r < p; r++) { now.push(0); peak.push(0); last.push(0); }
  function sides() {
    return now.map(function (held, rank) { return [held / v, peak[rank] / v]; });
  }
  function facts() {
    return { time: number(end), waiting: percent(1 - busy / (p * end)) };
  }
  function mark(rank, op, place, start, stop, kind, value) {
    return {
      id: rank + "/" + name(op), shape: "bar", at: [start, stop, rank],
      text: String(op[1]), kind: kind, value: value,
      line: "schedule[" + rank + "][" + place + "] is ('" + op[0] + "', " + op[1] + ", " + op[2] + ")"
    };
  }
  var steps = [{
    alt: p + " ranks, " + m + " microbatches. Nothing has run yet.", sides: sides()
  }];
  bars.sort(function (a, b) { return a.start - b.start || a.rank - b.rank; });
  bars.forEach(function (bar) {
    var rank = bar.rank, op = bar.op, waited = bar.start - last[rank];
    var value = name(op) + " on rank " + rank + ": from " + number(bar.start) + " to " + number(bar.end);
    if (waited > 0) value += ", after waiting " + number(waited);
    last[rank] = bar.end;
    busy += bar.end - bar.start;
    end = Math.max(end, bar.end);
    until = Math.max(until, bar.end);
    now[rank] += holds[op[0]];
    peak[rank] = Math.max(peak[rank], now[rank]);
    var alt = value + ". Rank " + rank + " holds " + number(now[rank] / v) + ", at most " + number(peak[rank] / v) + " so far.";
    if (steps.length === total) {
      var most = sides().map(function (side) { return number(side[1]); }).join(", ");
      alt += " All is done after " + facts().time + ": the ranks wait " + facts().waiting + " of the time, and hold at most " + most + " microbatches.";
    }
    var colour = (op[2] % 2 ? "pale-" : "") + colours[op[0]];
    steps.push({
      marks: [mark(rank, op, bar.place, bar.start, bar.end, colour, value)],
      alt: alt, facts: facts(), sides: sides()
    });
  });

  // The rank and the op that make a result
  function maker(lacks) {
    for (var rank = 0; rank < p; rank++) {
      for (var op of lists[rank]) {
        var makes = lacks[0] === "F" ? op[0] === "F" : op[0] === "B" || op[0] === "I";
        if (makes && op[1] === lacks[1] && stageOf(rank, op[2]) === lacks[2]) return [rank, op];
      }
    }
  }
  var stuck = [], said = [], marks = [];
  for (r = 0; r < p; r++) {
    if (next[r] === lists[r].length) continue;
    var op = lists[r][next[r]];
    var lacks = needs(op, r).filter(function (result) { return !done[result]; })[0];
    var found = maker(lacks);
    var whose = found[0] === r ? " of its own list, further down" : " of rank " + found[0];
    var sentence = "rank " + r + " cannot begin " + name(op) + ": it waits for " + name(found[1]) + whose;
    var stop = last[r] + seconds[op[0]] / v;
    until = Math.max(until, stop);
    said.push(sentence);
    stuck.push({ rank: r, place: next[r], waits: found });
    marks.push(mark(r, op, next[r], last[r], stop, "stuck", sentence));
  }
  var fault = said.length ? "Deadlock: " + said.join("; ") + "." : "";
  if (fault) {
    var so_far = { marks: marks, alt: fault, sides: sides() };
    if (end) so_far.facts = facts();
    steps.push(so_far);
  }
  return {
    scene: { lanes: p, until: until }, steps: steps, fault: fault,
    stop: fault ? steps.length - 1 : null,
    result: {
      time: end, bubble: 1 - busy / (p * end), stuck: stuck,
      peaks: peak.map(function (most) { return most / v; }), name: name
    }
  };
}
