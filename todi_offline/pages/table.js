// Rows in, a table that sorts by any column out; and names with their values.

function drawTable(block) {
  const body = element("tbody", {});
  const order = block.rows.map((_, number) => number);
  const isNumber = block.columns.map((_, column) => block.rows.every((row) => typeof row[column] !== "string"));
  const heads = block.columns.map((name, column) => {
    const button = element("button", { type: "button", onclick: () => sort(column) }, name);
    return element("th", { scope: "col", class: isNumber[column] ? "number" : null }, button);
  });
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body);

  function sort(column) {
    const isAscending = heads[column].getAttribute("aria-sort") !== "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", isAscending ? "ascending" : "descending");
    order.sort((a, b) => compare(block.rows[a][column], block.rows[b][column]) * (isAscending ? 1 : -1) || a - b);
    show();
  }

  function show() {
    body.replaceChildren(...order.map((number) => {
      const address = block.links ? block.links[number] : null;
      const cells = block.rows[number].map((value, column) => {
        const text = isNumber[column] ? shortNumber(value) : value;
        const content = column === 0 && address ? element("a", { href: address }, text) : text;
        return element("td", { class: isNumber[column] ? "number" : null }, content);
      });
      return element("tr", {}, ...cells);
    }));
  }

  show();
  return element("div", { class: "scrolling", tabindex: 0, role: "region", "aria-label": "table" }, table);
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "string" ? a.localeCompare(b, "en") : a - b;
}

function drawFacts(block) {
  return element("dl", { class: "facts" },
    ...block.rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

function drawNumbers(block) {
  return element("dl", { class: "facts means" }, ...block.rows.map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}
