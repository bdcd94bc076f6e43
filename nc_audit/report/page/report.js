"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const PER_PAGE = 24;
  const controls = { text: byId("f-text"), tag: byId("f-tag"), kind: byId("f-kind"), split: byId("f-split"), sort: byId("f-sort") };
  let shown = data.pairs;
  let page = 0;

  for (const pair of data.pairs) {
    pair.haystack = [pair.caption, pair.image, pair.bestCaption || "", ...pair.reasons].join("\n").toLowerCase();
  }

  // Everything that comes from the data goes in as text, never as markup.
  function element(name, kind, text) {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function options(select, values) {
    for (const value of values) {
      const made = element("option", "", value);
      made.value = value;
      select.append(made);
    }
  }

  function picture(place, name) {
    if (place === null || place === undefined) return element("div", "missing", "no picture");
    const made = element("img");
    made.alt = name;
    made.loading = "lazy";
    made.decoding = "async";
    made.src = data.pictures[place];
    return made;
  }

  function side(title, place, image, caption) {
    const made = element("div", "side");
    made.append(element("h4", "", title), picture(place, image));
    const words = element("p", "caption", caption);
    words.dir = "auto";
    made.append(words);
    return made;
  }

  function card(pair) {
    const made = element("li", "card " + (pair.tag || ""));
    const head = element("h3");
    head.append(element("span", "badge", pair.tag || "no tag"));
    if (pair.p !== null) head.append(element("span", "p", "p " + pair.p.toFixed(3)));
    head.append(element("span", "where", "row " + pair.row.toLocaleString("en") + (pair.copies > 1 ? ", " + pair.copies + " copies" : "")));
    made.append(head);
    const sides = element("div", "sides");
    sides.append(side("Given", pair.thumb, pair.image, pair.caption));
    if (pair.bestCaption) sides.append(side("Better caption, by " + pair.captionMargin.toFixed(2), pair.thumb, pair.image, pair.bestCaption));
    if (pair.bestImage) sides.append(side("Better image, by " + pair.imageMargin.toFixed(2), pair.bestThumb, pair.bestImage, pair.caption));
    made.append(sides);
    if (pair.reasons.length) {
      const list = element("ul", "reasons");
      for (const reason of pair.reasons) list.append(element("li", "", reason));
      made.append(list);
    }
    const facts = Object.entries(pair.scores).map(([name, value]) => name.replaceAll("_", " ") + " " + (Number.isInteger(value) ? value.toLocaleString("en") : value.toFixed(3)));
    if (pair.split) facts.unshift("split " + pair.split);
    if (pair.by) facts.unshift("decided by " + pair.by);
    made.append(element("p", "file", pair.image), element("p", "facts", facts.join(" · ")));
    return made;
  }

  function render() {
    const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    byId("pairs").replaceChildren(...shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(card));
    byId("count").textContent = shown.length.toLocaleString("en") + (shown.length === 1 ? " pair, page " : " pairs, page ") + (page + 1) + " of " + pages;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
  }

  function turn(by) {
    const before = page;
    page += by;
    render();
    if (page !== before) byId("gallery").scrollIntoView();
  }

  function filter() {
    const words = controls.text.value.trim().toLowerCase();
    const { tag, kind, split, sort } = { tag: controls.tag.value, kind: controls.kind.value, split: controls.split.value, sort: controls.sort.value };
    shown = data.pairs.filter((pair) =>
      (!tag || pair.tag === tag) && (!kind || pair.kinds.includes(kind)) && (!split || pair.split === split) && (!words || pair.haystack.includes(words)));
    const low = (value) => (value === null ? -Infinity : value);
    if (sort === "p" || sort === "captionMargin" || sort === "imageMargin") shown.sort((a, b) => low(b[sort]) - low(a[sort]) || a.row - b.row);
    if (sort === "q") shown.sort((a, b) => low(a.p) - low(b.p) || a.row - b.row);
    if (sort === "row") shown.sort((a, b) => a.row - b.row);
    page = 0;
    render();
  }

  options(controls.tag, [...new Set(data.pairs.map((pair) => pair.tag).filter(Boolean))].sort());
  options(controls.kind, data.kinds);
  options(controls.split, [...new Set(data.pairs.map((pair) => pair.split).filter(Boolean))].sort());
  for (const control of Object.values(controls)) control.addEventListener("input", filter);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (event.key === "j" || event.key === "ArrowRight") turn(1);
    else if (event.key === "k" || event.key === "ArrowLeft") turn(-1);
    else if (event.key === "/") controls.text.focus();
    else return;
    event.preventDefault();
  });
  render();
})();
