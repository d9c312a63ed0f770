"use strict";
// Names and texts in, elements out. Texts become text nodes and nothing else: no markup is ever parsed.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element; properties are set, `class` and `on...` as they are named, attributes otherwise. */
function element(name, properties = {}, ...children) {
  return fill(document.createElement(name), properties, children);
}

function shape(name, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, name), properties, children);
}

function fill(node, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Write a number with few digits; what is no number is a dash. */
function shortNumber(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e7)) return value.toExponential(1);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return value.toLocaleString("en-US", { maximumFractionDigits: size < 1 ? 4 : size < 100 ? 3 : 0 });
}

function percent(value) {
  if (value === null || Number.isNaN(value)) return "–";
  return value > 0 && value < 0.001 ? "<0.1%" : `${(100 * value).toFixed(1)}%`;
}
