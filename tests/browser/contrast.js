// axe's rules on one page, its contrast rule once for each look that a text has.
//
// Nine tenths of axe's time go into the contrast of single words: a lesson has 2,500,
// each coloured word of a code cell being one. What that rule finds depends on the
// text's own look and on what is painted beneath it, and on nothing else. So the texts
// are put in groups that agree in all of that, and axe judges one of each group. Where
// axe cannot decide on that one (and says neither yes nor no), it is asked about the
// next. All of its other rules of a serious kind see the whole page.
window.pageChecks = (() => {
  let original;
  const MARK = "data-contrast-sample";
  const FIELDS = "input:not([type=range], [type=checkbox], [type=radio], [type=color])";
  const CONTROLS = `${FIELDS}, select, textarea`;
  const PICTURES = "img, svg, canvas, video, iframe, object";
  // Of a text itself. They are inherited, so its own suffice.
  const TEXT = ["color", "fontSize", "fontWeight", "textShadow", "webkitTextFillColor",
    "webkitTextStrokeWidth", "webkitTextStrokeColor"];
  // Of a text and of each element around it, with the value that changes nothing.
  const PAINT = Object.entries({
    backgroundColor: "rgba(0, 0, 0, 0)", backgroundImage: "none", opacity: "1",
    filter: "none", mixBlendMode: "normal", backgroundClip: "border-box",
  });

  function paint(style) {
    let look = "";
    for (const [name, plain] of PAINT) {
      const value = style[name];
      if (value !== plain) {
        look += `${name}:${value};`;
      }
    }
    return look;
  }

  // Not drawn at all. The clip is the usual way to leave a text to screen readers.
  function unseen(style) {
    return style.display === "none" || style.opacity === "0"
      || (style.position === "absolute" && style.clip === "rect(1px, 1px, 1px, 1px)");
  }

  function hasBackground(style) {
    return style.backgroundColor !== "rgba(0, 0, 0, 0)"
      || style.backgroundImage !== "none";
  }

  function ownText(element) {
    if (element.matches(CONTROLS)) {
      return (element.value || element.placeholder || "").trim();
    }
    let text = "";
    for (const node of element.childNodes) {
      if (node.nodeType === Node.TEXT_NODE) {
        text += node.data;
      }
    }
    return text.trim();
  }

  // axe judges what holds a letter or a digit: no brackets, no emoji alone.
  function readable(text) {
    const signs = { emoji: true, punctuations: true };
    return /[\p{L}\p{N}]/u.test(text)
      || axe.commons.text.removeUnicode(text, signs) !== "";
  }

  // How much of the text lies on the box: all, part, none.
  function lies(text, box) {
    const inside = text.left >= box.left - 1 && text.right <= box.right + 1
      && text.top >= box.top - 1 && text.bottom <= box.bottom + 1;
    return inside ? "a" : overlap(text, box) ? "p" : "n";
  }

  function overlap(a, b) {
    return a.left < b.right - 1 && b.left < a.right - 1
      && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  }

  // The page's texts and everything that is painted on it.
  function walk() {
    const texts = [];
    const painted = [];
    // Looks of an element's surroundings, each met once: their number is the key.
    const known = new Map();
    const number = (key) => known.get(key) ?? known.set(key, known.size).get(key);

    function visit(element, around, boxes) {
      const style = getComputedStyle(element);
      if (unseen(style)) {
        return;
      }
      const own = paint(style);
      const surroundings = own ? number(`${around}|${own}`) : around;
      const picture = element.matches(PICTURES);
      if (picture || hasBackground(style)) {
        const box = element.getBoundingClientRect();
        painted.push({ element, box });
        boxes = { box, outer: boxes };
      }
      const text = picture ? "" : ownText(element);
      const shown = element.checkVisibility({ visibilityProperty: true });
      if (text && readable(text) && shown) {
        const look = TEXT.map((name) => style[name]).join("|");
        const kind = `${element.localName}.${element.className}`;
        const key = `${kind}|${surroundings}|${look}`;
        texts.push({ element, text, key, boxes, box: element.getBoundingClientRect() });
      }
      if (!picture) {
        for (const child of element.children) {
          visit(child, surroundings, boxes);
        }
      }
    }

    visit(document.documentElement, "", null);
    return { texts, painted };
  }

  // Lists of texts that look alike on alike ground.
  function groups() {
    const { texts, painted } = walk();
    const alike = new Map();
    for (const [i, { element, text, key, boxes, box }] of texts.entries()) {
      let full = `${key}|`;
      for (let at = boxes; at; at = at.outer) {
        full += lies(box, at.box);
      }
      // Something else that is painted where this text stands: it is judged alone.
      const meets = painted.some((other) => overlap(box, other.box)
        && !other.element.contains(element) && !element.contains(other.element));
      if (meets) {
        full += `|${i}`;
      }
      if (!alike.has(full)) {
        alike.set(full, []);
      }
      alike.get(full).push({ element, length: text.length });
    }
    return [...alike.values()];
  }

  // axe's contrast rule, made to ask about a group where it asked about an element.
  function judgeGroups(alike) {
    const rule = axe._audit.rules.find((each) => each.id === "color-contrast");
    const question = axe._audit.checks["color-contrast"];
    original ??= { matches: rule.matches, evaluate: question.evaluate };
    const groupOf = new Map(alike.map((group) => [group[0].element, group]));
    const bad = new Set();

    function evaluate(sample, options, virtual, context) {
      let said;
      const listener = Object.create(this);
      listener.data = (data) => {
        said = data;
        this.data(data);
      };
      for (const { element } of groupOf.get(sample)) {
        const node = axe.utils.getNodeFromTree(element);
        said = undefined;
        if (!original.matches.call(rule, element, node, context)) {
          continue;
        }
        let answer = original.evaluate.call(listener, element, options, node, context);
        // axe leaves a text of its ground's colour undecided; nobody can read it.
        if (said?.messageKey === "equalRatio") {
          answer = false;
        }
        if (answer === undefined) {
          continue;
        }
        if (!answer) {
          groupOf.get(sample).forEach((text) => bad.add(text.element));
        }
        return answer;
      }
      return undefined;
    }

    const selector = `[${MARK}]`;
    axe.configure({
      rules: [{ id: "color-contrast", selector, matches: () => true }],
      checks: [{ id: "color-contrast", evaluate }],
    });
    return bad;
  }

  // The contrast rule as axe has it, on every element: elements by its three answers.
  async function whole() {
    const { matches, evaluate } = original;
    axe.configure({
      rules: [{ id: "color-contrast", selector: "*", matches }],
      checks: [{ id: "color-contrast", evaluate }],
    });
    const found = await axe.run({
      preload: false, elementRef: true, runOnly: ["color-contrast"],
    });
    const elements = (results) => new Set(
      results.flatMap((result) => result.nodes.map((node) => node.element)));
    return {
      passes: elements(found.passes), violations: elements(found.violations),
      incomplete: elements(found.incomplete),
    };
  }

  // Whether the samples say what the whole rule says; the texts on which they differ.
  async function compare() {
    const { bad, elements } = await check();
    const all = await whole();
    const html = (list) => list.map((element) => element.outerHTML.slice(0, 200));
    // axe passes what is hidden; those texts are not listed.
    const forgotten = [...all.passes].filter(
      (element) => !elements.has(element) && element.checkVisibility());
    return {
      judged: all.passes.size + all.violations.size,
      violations: all.violations.size,
      missed: html([...all.violations].filter((element) => !bad.has(element))),
      invented: html([...bad].filter((element) => all.passes.has(element))),
      unlisted: html(forgotten),
    };
  }

  // Rules of which axe ranks no finding as serious: nobody acts on what they find.
  function ignored() {
    const low = axe._audit.rules.filter(
      (rule) => rule.impact === "minor" || rule.impact === "moderate");
    return Object.fromEntries(low.map((rule) => [rule.id, { enabled: false }]));
  }

  // What axe finds on the page as it is, and its texts: all, and those hard to read.
  async function check() {
    const alike = groups();
    // The longest text first: axe does not decide on a single letter.
    for (const group of alike) {
      group.sort((a, b) => b.length - a.length);
      group[0].element.setAttribute(MARK, group.length);
    }
    const bad = judgeGroups(alike);
    const found = await axe.run({
      preload: false, selectors: false, resultTypes: ["violations"], rules: ignored(),
    });
    for (const group of alike) {
      group[0].element.removeAttribute(MARK);
    }
    const mark = new RegExp(` ${MARK}="\\d+"`);
    const violations = found.violations.map(({ id, impact, nodes }) => (
      { id, impact, count: nodes.length, html: nodes[0].html.replace(mark, "") }));
    const elements = new Set(alike.flat().map((text) => text.element));
    return { violations, bad, elements };
  }

  return { check, compare };
})();
