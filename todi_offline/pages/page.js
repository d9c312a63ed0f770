// The data of the page in, the page out.

const DRAW = {
  facts: drawFacts,
  numbers: drawNumbers,
  lines: drawLines,
  histogram: drawHistogram,
  bars: drawBars,
  table: drawTable,
  texts: drawTexts,
  tokens: drawTokens,
};
const CHARTS = ["lines", "histogram", "bars"];
const NUMBERS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

async function openData() {
  const text = document.getElementById("data").textContent;
  const deflated = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const buffer = await new Response(stream).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const { page, arrays } = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const opened = arrays.map(({ type, shape: sizes, start }) => ({
    values: new NUMBERS[type](buffer, 4 + length + start, sizes.reduce((product, size) => product * size, 1)),
    width: sizes[1] ?? 1,
  }));
  return withArrays(page, opened);
}

/** Put the arrays into the places that name them by number. */
function withArrays(value, arrays) {
  if (value === null || typeof value !== "object") return value;
  if (typeof value.array === "number") return arrays[value.array];
  for (const key of Object.keys(value)) value[key] = withArrays(value[key], arrays);
  return value;
}

function drawSection(section) {
  const children = [element("h2", {}, section.title)];
  if (section.note) children.push(element("p", { class: "note" }, section.note));
  let grid = null;
  for (const block of section.blocks) {
    if (!CHARTS.includes(block.kind)) grid = null;
    else if (!grid) children.push((grid = element("div", { class: "charts" })));
    const drawn = DRAW[block.kind](block);
    if (grid) grid.append(drawn);
    else children.push(drawn);
  }
  return element("section", {}, ...children);
}

async function start() {
  const main = document.getElementById("page");
  try {
    const page = await openData();
    main.replaceChildren(element("h1", {}, page.title), ...page.sections.map(drawSection));
    main.dataset.ready = "yes";
    window.dispatchEvent(new Event("hashchange"));
  } catch (error) {
    main.replaceChildren(element("p", { role: "alert" }, `This page cannot be shown: ${error.message}`));
    throw error;
  }
}

start();
