// What several wrote in answer to the same in, the texts beside each other out.

function drawTexts(block) {
  const cards = block.rows.map(([heading, columns]) => {
    const texts = columns.map(([name, text]) =>
      element("div", {}, element("h4", {}, name), element("p", { class: "written" }, text || "(nothing)")));
    const asked = element("p", { class: "asked" }, heading);
    return element("article", {}, asked, element("div", { class: "beside" }, ...texts));
  });
  return element("div", { class: "texts" }, ...cards);
}
