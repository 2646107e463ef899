(function () {
  var here = document.currentScript;
  var roots = here ? [here.closest(".llmlab-explore")] : document.querySelectorAll(".llmlab-explore");
  roots.forEach(function (root) {
    if (!root || root.dataset.ready) return;
    var json = root.querySelector("script[type='application/json']");
    if (!json) return;
    root.dataset.ready = "1";
    var data = JSON.parse(json.textContent);
    var image = root.querySelector("img"), caption = root.querySelector("figcaption");
    var controls = root.querySelectorAll(".llmlab-control");
    var before = root.querySelector(".llmlab-before");
    var told = root.querySelector(".llmlab-challenge [role=status]");
    function position(control) {
      return +control.querySelector("input[type=range], input:checked").value;
    }
    function shown() {
      var at = 0, words = [];
      controls.forEach(function (control, k) {
        var i = position(control), value = data.values[k][i];
        at = at * data.values[k].length + i;
        words.push(data.names[k] + " " + value);
        var slider = control.querySelector("input[type=range]");
        if (!slider) return;
        slider.setAttribute("aria-valuetext", value);
        control.querySelector("output").textContent = value;
      });
      return { at: at, words: words.join(", ") };
    }
    function trace(from, to) {
      var axes = data.traces[to.at][0], present = data.traces[to.at][1];
      var paths = data.traces[from.at][1].filter(function (i) {
        return present.indexOf(i) < 0 && axes.indexOf(data.marks[i][0]) >= 0;
      }).map(function (i) {
        var path = '<path d="' + data.marks[i][1] + '"';
        return path + "/>" + path + ' stroke="' + data.marks[i][2] + '"/>';
      });
      root.querySelector("svg").innerHTML = paths.join("");
      before.textContent = paths.length ? "before: " + from.words : "";
    }
    var last = shown();
    function update() {
      var now = shown();
      image.src = data.frames[now.at][0];
      image.alt = caption.textContent = data.frames[now.at][1];
      if (told) told.textContent = "";
      if (data.traces && now.at !== last.at) trace(last, now);
      last = now;
    }
    var form = root.querySelector("form");
    form.addEventListener("input", update);
    // JupyterLab takes the arrow keys for itself, and the focus with them.
    root.addEventListener("keydown", function (event) { event.stopPropagation(); });
    form.addEventListener("submit", function (event) { event.preventDefault(); });
    if (told) root.querySelector("button").addEventListener("click", function () {
      var missing = data.missing[last.at];
      told.textContent = missing ? "Not yet: " + missing : "Yes: " + last.words + ".";
    });
  });
})();
