// The numbers of a chart in, a picture that fits its place out.

const HEIGHT = 240;
const MARGIN = { left: 62, right: 12, top: 10, bottom: 40 };

function drawLines(block) {
  const figure = figureOf(block);
  if (block.series.length > 1) figure.append(legendOf(block.series));
  const readout = element("p", { class: "readout" }, "");
  whenSized(figure, (width) => {
    const scales = scalesOf(block, width);
    const lines = block.series.map((item, number) => lineOf(item, number, scales));
    return picture(block, width, scales, lines.flat(), (x) => { readout.textContent = nearest(block, x); });
  });
  figure.append(readout);
  return figure;
}

function drawHistogram(block) {
  const figure = figureOf(block);
  const { edges, counts } = block;
  const readout = element("p", { class: "readout" }, "");
  const total = counts.reduce((sum, count) => sum + count, 0);
  whenSized(figure, (width) => {
    const scales = makeScales([edges[0], edges.at(-1)], [0, Math.max(...counts)], width, false);
    const columns = counts.map((count, number) => shape("rect", {
      class: "column",
      x: scales.x(edges[number]) + 0.5,
      width: Math.max(1, scales.x(edges[number + 1]) - scales.x(edges[number]) - 1),
      y: scales.y(count),
      height: scales.y(0) - scales.y(count),
    }));
    return picture(block, width, scales, columns, (x) => {
      const bin = Math.min(counts.length - 1, Math.max(0, edges.findLastIndex((edge) => edge <= x)));
      const range = `${shortNumber(edges[bin])} to ${shortNumber(edges[bin + 1])}`;
      readout.textContent = `${range}: ${shortNumber(counts[bin])} (${percent(counts[bin] / total)})`;
    });
  });
  figure.append(readout);
  return figure;
}

function drawBars(block) {
  const longest = Math.max(...block.rows.map((row) => row[1]));
  const rows = block.rows.map(([name, length, words]) => {
    const bar = element("span", { class: "bar" });
    bar.style.width = `${(100 * length) / longest}%`;
    return element("li", {}, element("span", { class: "name" }, name), element("span", { class: "track" }, bar),
      element("span", { class: "words" }, words));
  });
  const figure = figureOf(block);
  figure.append(element("ul", { class: "bars" }, ...rows));
  return figure;
}

function figureOf(block) {
  const note = block.note ? element("p", { class: "note" }, block.note) : null;
  return element("figure", {}, element("figcaption", {}, element("h3", {}, block.title), note));
}

function legendOf(series) {
  const items = series.map((item, number) => {
    const key = shape("svg", { width: 26, height: 10, "aria-hidden": "true" },
      shape("line", { class: `line ${styleOf(item, number)}`, x1: 1, x2: 25, y1: 5, y2: 5 }));
    return element("li", {}, key, " " + item.name);
  });
  return element("ul", { class: "legend" }, ...items);
}

/** Name the colour and the dashes of a line: by its place, or as it says itself. */
function styleOf(item, number) {
  return `series${(item.color ?? number) % 4}${item.is_held_out ? " held-out" : ""}`;
}

/** Draw anew whenever the width of the figure changes, so that letters keep their size. */
function whenSized(figure, draw) {
  let drawn = null;
  let width = 0;
  new ResizeObserver(() => {
    const found = Math.floor(figure.clientWidth);
    if (found < 120 || found === width) return;
    width = found;
    const next = draw(width);
    if (drawn) drawn.replaceWith(next);
    else figure.querySelector(".readout").before(next);
    drawn = next;
  }).observe(figure);
}

function scalesOf(block, width) {
  const xs = block.series.flatMap((item) => item.x).filter((x) => x !== null);
  const ys = block.series.flatMap((item) => [...item.y, ...(item.low ?? []), ...(item.high ?? [])])
    .filter((y) => y !== null);
  const low = block.from_zero ? Math.min(0, ...ys) : Math.min(...ys);
  return makeScales([Math.min(...xs), Math.max(...xs)], [low, Math.max(...ys)], width, block.log_x);
}

function makeScales(xRange, yRange, width, isLog) {
  const warp = isLog ? (x) => Math.log(x) : (x) => x;
  const unwarp = isLog ? (x) => Math.exp(x) : (x) => x;
  const [x0, x1] = widened(xRange.map(warp));
  const yTicks = linearTicks(...widened(yRange), 5, true);
  const [y0, y1] = [yTicks[0], yTicks.at(-1)];
  const [right, bottom] = [width - MARGIN.right, HEIGHT - MARGIN.bottom];
  return {
    x: (x) => MARGIN.left + ((warp(x) - x0) / (x1 - x0)) * (right - MARGIN.left),
    y: (y) => bottom - ((y - y0) / (y1 - y0)) * (bottom - MARGIN.top),
    back: (pixel) => unwarp(x0 + ((pixel - MARGIN.left) / (right - MARGIN.left)) * (x1 - x0)),
    xTicks: isLog ? logTicks(unwarp(x0), unwarp(x1)) : linearTicks(x0, x1, Math.max(3, Math.floor(width / 70)), false),
    yTicks,
    right,
    bottom,
  };
}

function widened([low, high]) {
  return high > low ? [low, high] : [low - 0.5, low + 0.5];
}

/** Return round numbers, about so many, from low to high; or from before low to beyond high. */
function linearTicks(low, high, most, isBeyond) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = isBeyond ? Math.floor(low / step + 1e-9) : Math.ceil(low / step - 1e-9);
  const last = isBeyond ? Math.ceil(high / step - 1e-9) : Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, number) => Number(((first + number) * step).toPrecision(12)));
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10) {
    ticks.push(...[1, 2, 5].map((factor) => factor * power));
  }
  return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
}

function picture(block, width, scales, content, point) {
  const cursor = shape("line", { class: "cursor", y1: MARGIN.top, y2: scales.bottom, visibility: "hidden" });
  const svg = shape("svg", {
    class: "chart", viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", tabindex: 0,
    "aria-label": `${block.title}: ${block.y} by ${block.x}`,
  }, ...axes(block, width, scales), ...content, cursor);
  let at = MARGIN.left;
  const move = (pixel) => {
    at = Math.min(scales.right, Math.max(MARGIN.left, pixel));
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, at);
    cursor.setAttribute("visibility", "visible");
    point(scales.back(at));
  };
  svg.addEventListener("pointermove", (event) => move(event.clientX - svg.getBoundingClientRect().left));
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    move(at + (step * (scales.right - MARGIN.left)) / 60);
  });
  return svg;
}

function axes(block, width, scales) {
  const parts = [];
  for (const tick of scales.yTicks) {
    const y = scales.y(tick);
    parts.push(shape("line", { class: "grid", x1: MARGIN.left, x2: scales.right, y1: y, y2: y }));
    parts.push(shape("text", { class: "tick", x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, shortNumber(tick)));
  }
  for (const tick of scales.xTicks) {
    const x = scales.x(tick);
    parts.push(shape("line", { class: "mark", x1: x, x2: x, y1: scales.bottom, y2: scales.bottom + 4 }));
    const label = { class: "tick", x, y: scales.bottom + 17, "text-anchor": "middle" };
    parts.push(shape("text", label, shortNumber(tick)));
  }
  const middle = (MARGIN.left + scales.right) / 2;
  parts.push(shape("text", { class: "axis", x: middle, y: HEIGHT - 5, "text-anchor": "middle" }, block.x));
  const turned = `translate(10 ${(MARGIN.top + scales.bottom) / 2}) rotate(-90)`;
  parts.push(shape("text", { class: "axis", transform: turned, "text-anchor": "middle" }, block.y));
  return parts;
}

function lineOf(item, number, scales) {
  const known = item.x.map((x, at) => at).filter((at) => item.y[at] !== null && item.x[at] !== null);
  const corner = (values) => (at) => `${scales.x(item.x[at]).toFixed(1)},${scales.y(values[at]).toFixed(1)}`;
  const kind = styleOf(item, number);
  const parts = [];
  if (item.low) {
    const inside = known.filter((at) => item.low[at] !== null && item.high[at] !== null);
    const around = [...inside.map(corner(item.high)), ...inside.toReversed().map(corner(item.low))];
    parts.push(shape("polygon", { class: `band ${kind}`, points: around.join(" ") }));
  }
  parts.push(shape("polyline", { class: `line ${kind}`, points: known.map(corner(item.y)).join(" ") }));
  if (known.length <= 24) {
    parts.push(...known.map((at) => shape("circle", {
      class: `dot ${kind}`, cx: scales.x(item.x[at]), cy: scales.y(item.y[at]), r: 2.5,
    })));
  }
  return parts;
}

/** Say in words what every series has nearest to x. */
function nearest(block, x) {
  const warp = block.log_x ? Math.log : (value) => value;
  const found = block.series.map((item) => {
    const known = item.x.map((_, at) => at).filter((at) => item.y[at] !== null && item.x[at] !== null);
    if (!known.length) return "";
    const distance = (at) => Math.abs(warp(item.x[at]) - warp(x));
    const at = known.reduce((best, other) => (distance(other) < distance(best) ? other : best));
    const name = block.series.length > 1 ? `${item.name} ` : "";
    const band = item.low ? ` (${shortNumber(item.low[at])} to ${shortNumber(item.high[at])})` : "";
    return `${name}at ${shortNumber(item.x[at])}: ${shortNumber(item.y[at])}${band}`;
  });
  return found.filter(Boolean).join("; ");
}
