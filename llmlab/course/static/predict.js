(function () {
  var KEY = "llmlab-guess-";
  function stored(uid, typed) {
    try {
      if (typed === undefined) return sessionStorage.getItem(KEY + uid) || "";
      sessionStorage.setItem(KEY + uid, typed);
    } catch (blocked) { /* the guess then lives as long as the page */ }
    return typed || "";
  }
  function number(text) {
    var found = /[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?/i.exec(text.replace(/,/g, ""));
    return found ? parseFloat(found[0]) : null;
  }
  function rounded(value) {
    return Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 12 });
  }
  function verdict(typed, shown, isChoice) {
    if (isChoice) return "You said " + typed + ": " + (typed === shown ? "right" : "not so") + ".";
    var guess = number(typed), answer = number(shown);
    var said = "You said " + rounded(guess), ratio = answer / guess;
    if (guess === answer) return said + ": exactly.";
    if (guess === 0 || ratio <= 0) return said + ".";
    if (ratio >= 0.9 && ratio <= 1.1) return said + ": within 10%.";
    if (ratio > 1) return said + ": the answer is " + rounded(ratio) + " times as large.";
    return said + ": that is " + rounded(1 / ratio) + " times too large.";
  }
  function settle(uid, typed) {
    var field = document.querySelector(".llmlab-predict[data-guess='" + uid + "']");
    var isChoice = Boolean(field && field.querySelector("[type=radio]"));
    var usable = typed && (isChoice || number(typed) !== null);
    document.querySelectorAll(".llmlab-settled[data-guess='" + uid + "']").forEach(function (p) {
      var shown = p.querySelector("strong").textContent;
      p.querySelector("span").textContent = usable ? verdict(typed, shown, isChoice) : "";
    });
    if (!field) return;
    field.querySelector(".llmlab-said").textContent = !typed ? "" : usable
      ? "Kept. The answer comes below." : "Please write a number, such as 49 or 0.5.";
  }
  document.querySelectorAll(".llmlab-predict[data-guess]:not([data-ready])").forEach(function (field) {
    var uid = field.dataset.guess, typed = stored(uid);
    field.dataset.ready = "1";
    // JupyterLab takes the arrow keys for itself, and the focus with them.
    field.addEventListener("keydown", function (event) { event.stopPropagation(); });
    field.querySelectorAll("input").forEach(function (input) {
      if (input.type === "radio") input.checked = input.value === typed;
      else input.value = typed;
      input.addEventListener(input.type === "radio" ? "change" : "input", function () {
        settle(uid, stored(uid, input.value.trim()));
      });
    });
    settle(uid, typed);
  });
  document.querySelectorAll(".llmlab-settled[data-guess]").forEach(function (p) {
    if (!p.querySelector("span").textContent) settle(p.dataset.guess, stored(p.dataset.guess));
  });
})();
