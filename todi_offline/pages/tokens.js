// Sequences with what the models predict in; their text, coloured, and what lies behind each token out.

const OTHERS = "other kept ids";
const HELP = "Point at a token, tap it, or go there with the arrow keys (with Shift: to the next sequence). " +
  "Underlined tokens are supervised: the cache holds the teacher's prediction of them. Grey ones are only read.";
const TAIL = "all other ids (tail)";

function drawTokens(block) {
  const view = new TokenView(block);
  window.addEventListener("hashchange", () => view.follow(location.hash));
  return view.root;
}

class TokenView {
  constructor(block) {
    this.block = block;
    this.sequences = placed(block.sequences);
    this.measure = block.measures[0];
    this.text = element("div", {
      class: "tokens", role: "group", "aria-label": "tokens of the sequence",
      onpointerover: (event) => this.hover(event.target),
      onclick: (event) => this.choose(event.target),
      onfocusin: (event) => this.choose(event.target),
      onkeydown: (event) => this.press(event),
    });
    this.panel = element("aside", { class: "panel", "aria-live": "polite" });
    this.legend = element("div", { class: "scale" });
    this.missing = element("p", { class: "note", role: "status" });
    this.sequenceChoice = choiceOf("sequence", this.sequences.map(nameOf), (at) => this.open(at));
    this.measureChoice = choiceOf("colour", block.measures.map((item) => item.label), (at) => this.colour(at));
    this.root = element("div", { class: "view" },
      element("div", { class: "controls" },
        element("label", {}, "Sequence ", this.sequenceChoice),
        element("label", {}, "Colour ", this.measureChoice), this.legend),
      element("p", { class: "note" }, HELP),
      this.missing,
      element("div", { class: "beside-panel" }, this.text, this.panel));
    this.open(0, null, false);
  }

  /** Show a sequence, and one of its tokens: by default the first supervised one. */
  open(at, token = null, isAddressed = true) {
    this.at = at;
    this.sequence = this.sequences[at];
    this.sequenceChoice.value = at;
    const { labels } = this.block;
    this.targetOf = new Map();
    for (let target = 0; target < this.sequence.num_targets; target += 1) {
      this.targetOf.set(labels.values[this.sequence.firstTarget + target], this.sequence.firstTarget + target);
    }
    this.spans = [];
    this.spanOf = [];
    const fragment = document.createDocumentFragment();
    this.sequence.pieces.forEach((text, number) => {
      const span = element("span", {}, text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t"));
      span.dataset.token = this.spanOf.length;
      for (let part = 0; part < this.sequence.lengths.values[number]; part += 1) this.spanOf.push(span);
      this.spans.push(span);
      fragment.append(span);
    });
    this.text.replaceChildren(fragment);
    this.text.scrollTop = 0;
    this.colour(this.block.measures.indexOf(this.measure));
    const first = Math.min(...this.targetOf.keys());
    this.select(token ?? (Number.isFinite(first) ? first : 0), { isAddressed, isFocused: false });
  }

  colour(number) {
    this.measure = this.block.measures[number];
    this.measureChoice.value = number;
    for (const span of this.spans) {
      const found = this.targetsOf(span).map((target) => this.block[this.measure.name].values[target]);
      const value = found.length ? found.reduce((sum, item) => sum + item, 0) / found.length : null;
      this.paint(span, value);
    }
    this.legend.replaceChildren(...this.drawLegend());
    if (this.token !== undefined) this.drawPanel(this.token);
  }

  paint(node, value) {
    const { middle, far } = this.measure;
    const isHigh = middle === null || value >= middle;
    node.className = value === null ? "unsupervised" : `supervised ${isHigh ? "high" : "low"}`;
    const share = value === null ? 0 : middle === null ? value / far : Math.abs(value - middle) / (far - middle);
    node.style.setProperty("--strength", Math.min(1, Math.max(0, share)).toFixed(3));
  }

  drawLegend() {
    const { middle, far, note, name } = this.measure;
    const from = middle === null ? 0 : 2 * middle - far;
    const boxes = Array.from({ length: 11 }, (_, number) => {
      const box = element("span", {});
      this.paint(box, from + ((far - from) * number) / 10);
      return box;
    });
    const words = middle === null
      ? ["0", shortNumber(far / 2), `${shortNumber(far)}${name === "tail" && far >= 1 ? "" : " or more"}`]
      : [`${shortNumber(from)}: student gives more`, shortNumber(middle), `${shortNumber(far)}: teacher gives more`];
    return [element("div", { class: "ramp", "aria-hidden": "true" }, ...boxes),
      element("div", { class: "ends" }, ...words.map((word) => element("span", {}, word))),
      element("p", { class: "note" }, note)];
  }

  targetsOf(span) {
    const first = Number(span.dataset.token);
    const targets = [];
    for (let token = first; this.spanOf[token] === span; token += 1) {
      if (this.targetOf.has(token)) targets.push(this.targetOf.get(token));
    }
    return targets;
  }

  hover(node) {
    if (node.dataset.token !== undefined) this.drawPanel(Number(node.dataset.token));
  }

  choose(node) {
    if (node.dataset.token === undefined) return;
    if (this.spanOf[this.token] === node) this.drawPanel(this.token);
    else this.select(Number(node.dataset.token), { isAddressed: true, isFocused: true });
  }

  press(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (event.shiftKey && Number.isFinite(step)) {
      this.open((this.at + step + this.sequences.length) % this.sequences.length);
      this.spanOf[this.token].focus();
      return;
    }
    const token = Math.min(this.spanOf.length - 1, Math.max(0, this.token + step));
    this.select(token, { isAddressed: true, isFocused: true });
  }

  select(token, { isAddressed, isFocused }) {
    const before = this.spanOf[this.token];
    if (before) {
      before.removeAttribute("aria-current");
      before.setAttribute("tabindex", -1);
    }
    this.token = token;
    const span = this.spanOf[token];
    span.setAttribute("aria-current", "true");
    span.setAttribute("tabindex", 0);
    this.drawPanel(token);
    if (isFocused) span.focus();
    if (isAddressed) this.address();
  }

  /** Write the place into the address, when the keys have come to rest: browsers allow this a few times a second. */
  address() {
    clearTimeout(this.waiting);
    this.waiting = setTimeout(
      () => history.replaceState(null, "", `#seq=${this.sequence.number}&tok=${this.token}`), 200);
  }

  /** Go to the place that an address names. */
  follow(hash) {
    const found = new URLSearchParams(hash.slice(1));
    if (!found.has("seq")) return;
    const at = this.sequences.findIndex((item) => item.number === Number(found.get("seq")));
    this.missing.textContent = at < 0 ? `This page does not show sequence ${Number(found.get("seq"))}.` : "";
    if (at < 0) return;
    const token = found.has("tok") ? Number(found.get("tok")) : NaN;
    const isToken = Number.isInteger(token) && token >= 0 && token < this.sequences[at].num_tokens;
    this.open(at, isToken ? token : null, false);
    this.root.scrollIntoView({ block: "start" });
    this.spanOf[this.token].focus({ preventScroll: false });
  }

  drawPanel(token) {
    this.panel.dataset.token = token;
    const target = this.targetOf.get(token);
    const span = this.spanOf[token];
    const first = Number(span.dataset.token);
    const number = this.spanOf.filter((other) => other === span).length;
    const id = this.block.ids.values[this.sequence.firstToken + token];
    const name = number > 1 ? `part ${token - first + 1} of ${number} of ` : "";
    const heading = element("h3", {}, `Token ${token}: ${name}`, element("code", {}, inLine(span.textContent)));
    const real = this.block.vocabulary.ids.values[id];
    const bytes = number > 1 ? `, ${this.block.vocabulary.texts[id]}` : "";
    const parts = [heading, element("p", { class: "note" }, `id ${real}${bytes}`)];
    const none = "Not supervised: the cache holds no prediction of this token.";
    if (target === undefined) parts.push(element("p", {}, none));
    else parts.push(...this.drawEntries(target, id), this.drawMeasures(target));
    this.panel.replaceChildren(...parts);
  }

  drawMeasures(target) {
    const rows = this.block.measures.map(({ name, label, middle }) => {
      const value = this.block[name].values[target];
      return [element("dt", {}, label), element("dd", {}, middle === null ? shortNumber(value) : gateNumber(value))];
    });
    return element("dl", { class: "facts small" }, ...rows.flat());
  }

  /** Draw what each model gives to the ids that either thinks likely, and to the rest. */
  drawEntries(target, label) {
    const { block } = this;
    const width = block.entry_ids.width;
    const total = block.has_student ? block.todi.values[target] : null;
    const names = block.has_student ? ["", "teacher", "student", "gate", "share"] : ["", "teacher"];
    const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
    const rows = [];
    for (let column = 0; column < width; column += 1) {
      const entry = block.entry_ids.values[target * width + column];
      if (entry >= block.vocabulary.texts.length) continue;
      const at = target * width + column;
      const name = element("code", {}, inLine(block.vocabulary.texts[entry]));
      rows.push(this.drawEntry(name, Math.exp(block.entry_p.values[at]), (key) => read(block, key, at), total,
        entry === label ? "label" : null));
    }
    [OTHERS, TAIL].forEach((words, number) => {
      const at = target * 2 + number;
      const q = read(block, "rest_q", at);
      const found = { entry_q: Math.log(q), entry_part: read(block, "rest_part", at) };
      if (number === 1 || block.rest_p.values[at] > 0) {
        rows.push(this.drawEntry(words, block.rest_p.values[at], (key) => found[key], total, "rest"));
      }
    });
    const at = `At temperature ${block.temperature}`;
    const words = block.has_student
      ? `${at}. Gate: a = sigmoid(${block.beta} · log(teacher / student)). Share: of this token's ToDi. A dash: the ` +
        "cache does not keep this id, so it counts in the tail. "
      : `${at}. `;
    return [element("table", { class: "entries" }, element("thead", {}, head), element("tbody", {}, ...rows)),
      element("p", { class: "note" }, `${words}Underlined: the token that the text has here.`)];
  }

  drawEntry(name, p, of, total, kind) {
    const cells = [element("th", { scope: "row" }, name), cell(p, "teacher")];
    if (this.block.has_student) {
      const q = Math.exp(of("entry_q"));
      const gate = 1 / (1 + Math.exp(-this.block.beta * (Math.log(p) - Math.log(q))));
      const isOneEntry = name !== OTHERS;
      cells.push(cell(q, "student"), element("td", {}, isOneEntry ? gateNumber(gate) : "–"),
        element("td", {}, percent(total > 0 ? of("entry_part") / total : 0)));
    }
    return element("tr", { class: kind }, ...cells);
  }
}

/** Say where each sequence begins among the tokens and targets of all. */
function placed(sequences) {
  let [firstToken, firstTarget] = [0, 0];
  return sequences.map((item) => {
    const found = { ...item, firstToken, firstTarget };
    firstToken += item.num_tokens;
    firstTarget += item.num_targets;
    return found;
  });
}

function choiceOf(id, names, choose) {
  return element("select", { id, onchange: (event) => choose(Number(event.target.value)) },
    ...names.map((name, at) => element("option", { value: at }, name)));
}

function nameOf(item) {
  return `${item.number}: ${item.id} (${item.num_tokens} tokens, ${item.why})`;
}

function read(block, key, at) {
  return block[key] ? block[key].values[at] : NaN;
}

function gateNumber(value) {
  return Number.isNaN(value) ? "–" : value.toFixed(3);
}

function inLine(text) {
  return text.replaceAll("↵\n", "↵").replaceAll("\n", "↵").replace(/⇥?\t/g, "⇥").replace(/^ | $/g, "␣");
}

function cell(value, kind) {
  const bar = element("span", { class: `bar ${kind}` });
  bar.style.width = `${Number.isNaN(value) ? 0 : Math.min(100, 100 * value)}%`;
  return element("td", {}, percent(value), element("span", { class: "track" }, bar));
}
