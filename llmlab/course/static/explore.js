(function () {
  var here = document.currentScript;
  var roots = here ? [here.closest(".llmlab-explore")] : document.querySelectorAll(".llmlab-explore");
  roots.forEach(function (root) {
    if (!root || root.dataset.ready) return;
    root.dataset.ready = "1";
    var data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    var image = root.querySelector("img"), caption = root.querySelector("figcaption");
    var inputs = root.querySelectorAll("input"), outputs = root.querySelectorAll("output");
    function update() {
      var at = 0;
      inputs.forEach(function (input, k) {
        var i = +input.value, shown = data.values[k][i];
        at = at * data.values[k].length + i;
        input.setAttribute("aria-valuetext", shown);
        outputs[k].textContent = shown;
      });
      image.src = data.frames[at][0];
      image.alt = caption.textContent = data.frames[at][1];
    }
    inputs.forEach(function (input) { input.addEventListener("input", update); });
  });
})();
