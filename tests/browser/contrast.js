// axe's rules on one page, its contrast rule once for each look that a text has.
//
// Nine tenths of axe's time go into the contrast of single words: a lesson has 2,500,
// each coloured word of a code cell being one. What that rule finds depends on the
// text's own look and on what is painted beneath it, and on nothing else. So the texts
// are put in groups that agree in all of that, and axe judges one of each group. Where
// axe cannot decide on that one (and says neither yes nor no), it is asked about the
// next. All of its other rules of a serious kind see the whole page.
//
// Seven of ten elements of a lesson are such words: a span with a class, and a text in
// it. Only contrast can be wrong with one, so while axe looks, those that are no sample
// stand there as bare text, and axe has a page of a third of the size to go through.
window.pageChecks = (() => {
  let original;
  const MARK = "data-contrast-sample";
  const FIELDS = "input:not([type=range], [type=checkbox], [type=radio], [type=color])";
  const CONTROLS = `${FIELDS}, select, textarea`;
  const KEPT = 2; // words of a group that axe sees; more where it cannot decide on them
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

  // A word of a code cell: nothing but a colour and a weight, no box of its own.
  function isCodeWord(element, style, own) {
    const { length } = element.attributes;
    return element.localName === "span" && !element.firstElementChild && own === ""
      && (length === 0 || (length === 1 && element.hasAttribute("class")))
      && style.display === "inline" && style.position === "static";
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

  // The page's texts, the signs of its code, and everything that is painted on it.
  function walk() {
    const texts = [];
    const signs = [];
    const painted = [];
    // Looks of an element's surroundings, each met once: their number is the key.
    const known = new Map();
    const number = (key) => known.get(key) ?? known.set(key, known.size).get(key);

    function visit(element, around, boxes, inCode) {
      const style = getComputedStyle(element);
      if (unseen(style)) {
        return;
      }
      const own = paint(style);
      const surroundings = own ? number(`${around}|${own}`) : around;
      const picture = element.matches(PICTURES);
      // What is folded has a box where it would stand, upon what stands there instead.
      if ((picture || hasBackground(style)) && element.checkVisibility()) {
        const box = element.getBoundingClientRect();
        painted.push({ element, box });
        boxes = { box, outer: boxes };
      }
      const text = picture ? "" : ownText(element);
      const shown = element.checkVisibility({ visibilityProperty: true });
      const word = inCode && isCodeWord(element, style, own);
      if (text && readable(text) && shown) {
        const look = TEXT.map((name) => style[name]).join("|");
        const kind = `${element.localName}.${element.className}`;
        const key = `${kind}|${surroundings}|${look}`;
        const box = element.getBoundingClientRect();
        texts.push({ element, text, key, boxes, box, word });
      } else if (word) {
        signs.push(element);
      }
      if (!picture) {
        const code = inCode || element.matches(".highlight pre");
        for (const child of element.children) {
          visit(child, surroundings, boxes, code);
        }
      }
    }

    visit(document.documentElement, "", null, false);
    return { texts, signs, painted };
  }

  // Lists of texts that look alike on alike ground, the longest text of each first (axe
  // does not decide on a single letter), and the signs that no one reads as a text.
  function groups() {
    const { texts, signs, painted } = walk();
    const alike = new Map();
    for (const [i, { element, text, key, boxes, box, word }] of texts.entries()) {
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
      alike.get(full).push({ element, length: text.length, word });
    }
    for (const group of alike.values()) {
      group.sort((a, b) => b.length - a.length);
    }
    return { alike: [...alike.values()], signs };
  }

  // Puts bare text in the place of all code words that are a sample in none of the
  // lists of groups; returns what undoes it.
  function fold(lists) {
    const kept = new Set();
    const words = new Set();
    for (const { alike, signs } of lists) {
      signs.forEach((element) => words.add(element));
      for (const group of alike) {
        group.slice(0, KEPT).forEach(({ element }) => kept.add(element));
        group.filter(({ word }) => word).forEach(({ element }) => words.add(element));
      }
    }
    const folded = [...words].filter((element) => !kept.has(element)).map((element) => {
      const text = document.createTextNode(element.textContent);
      element.replaceWith(text);
      return { element, text };
    });
    return () => folded.forEach(({ element, text }) => text.replaceWith(element));
  }

  // axe's contrast rule, made to ask about a group where it asked about an element.
  function judgeGroups(alike) {
    const rule = axe._audit.rules.find((each) => each.id === "color-contrast");
    const question = axe._audit.checks["color-contrast"];
    original ??= { matches: rule.matches, evaluate: question.evaluate };
    const groupOf = new Map(alike.map((group) => [group[0].element, group]));
    const judged = { bad: new Set(), unsure: false };

    function evaluate(sample, options, virtual, context) {
      let said;
      const listener = Object.create(this);
      listener.data = (data) => {
        said = data;
        this.data(data);
      };
      for (const { element } of groupOf.get(sample)) {
        if (!element.isConnected) {
          // Single letters of one colour are alike; of others axe has to see more.
          judged.unsure ||= said?.messageKey !== "shortTextContent";
          break;
        }
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
          groupOf.get(sample).forEach((text) => judged.bad.add(text.element));
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
    return judged;
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
    const { theme } = document.documentElement.dataset;
    const [{ bad, elements, again }] = await check(theme);
    const all = await whole();
    const html = (list) => list.map((element) => element.outerHTML.slice(0, 200));
    // axe passes what is hidden; those texts are not listed.
    const forgotten = [...all.passes].filter(
      (element) => !elements.has(element) && element.checkVisibility());
    return {
      again,
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

  // What axe finds on the page with these groups.
  async function judge(alike) {
    for (const group of alike) {
      group[0].element.setAttribute(MARK, group.length);
    }
    const judged = judgeGroups(alike);
    const { violations } = await axe.run({
      preload: false, selectors: false, resultTypes: ["violations"], rules: ignored(),
    });
    for (const group of alike) {
      group[0].element.removeAttribute(MARK);
    }
    const mark = new RegExp(` ${MARK}="\\d+"`);
    judged.violations = violations.map(({ id, impact, nodes }) => (
      { id, impact, count: nodes.length, html: nodes[0].html.replace(mark, "") }));
    return judged;
  }

  // What axe finds on the page in each theme, and its texts: all, and those that are
  // hard to read. The last theme stays.
  async function check(...themes) {
    const show = (theme) => { document.documentElement.dataset.theme = theme; };
    const lists = themes.map((theme) => {
      show(theme);
      return groups();
    });
    let unfold = fold(lists);
    const found = [];
    for (const [i, { alike }] of lists.entries()) {
      show(themes[i]);
      let judged = await judge(alike);
      const again = judged.unsure;
      if (again) {
        unfold();
        unfold = () => {};
        judged = await judge(alike);
      }
      const elements = new Set(alike.flat().map((text) => text.element));
      found.push({ ...judged, again, elements });
    }
    unfold();
    return found;
  }

  return { check, compare };
})();
