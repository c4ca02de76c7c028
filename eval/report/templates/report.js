"use strict";
(() => {
  const root = document.documentElement;
  const plots = [...document.querySelectorAll(".plot")].map((box) => {
    const source = box.querySelector("script");
    const figure = JSON.parse(source.textContent);
    source.remove();
    return { box, figure };
  });

  // "$tuned" becomes the value of the CSS variable --tuned, anywhere in a figure.
  const painted = (node, style) => {
    if (typeof node === "string") return node.startsWith("$") ? style.getPropertyValue("--" + node.slice(1)).trim() || node : node;
    if (Array.isArray(node)) return node.map((inner) => painted(inner, style));
    if (node && typeof node === "object") {
      return Object.fromEntries(Object.entries(node).map(([name, inner]) => [name, painted(inner, style)]));
    }
    return node;
  };

  const draw = (width) => {
    const style = getComputedStyle(root);
    for (const { box, figure } of plots) {
      const { data, layout } = painted(figure, style);
      const { zoomable, ...given } = layout;
      const axis = (own) => ({
        gridcolor: style.getPropertyValue("--grid").trim(), linecolor: style.getPropertyValue("--rule").trim(),
        zerolinecolor: style.getPropertyValue("--rule").trim(), fixedrange: !zoomable, ...own,
        title: { ...own.title, font: { size: 13 } },
      });
      const full = {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: zoomable ? "zoom" : false,
        font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: style.getPropertyValue("--ink").trim() },
        hoverlabel: {
          bgcolor: style.getPropertyValue("--panel").trim(), bordercolor: style.getPropertyValue("--rule").trim(),
          font: { color: style.getPropertyValue("--ink").trim() },
        },
        ...given, xaxis: axis(given.xaxis), yaxis: axis(given.yaxis),
      };
      full.width = width ? width(box) : box.clientWidth;
      Plotly.react(box, data, full, { displayModeBar: false });
    }
  };
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  let pending;
  let drawnAt = innerWidth;
  addEventListener("resize", () => {
    clearTimeout(pending);
    pending = setTimeout(() => {
      if (innerWidth !== drawnAt && !root.classList.contains("paper")) {
        drawnAt = innerWidth;
        draw();
      }
    }, 150);
  });

  // On paper: light colours, and widths that fit an A4 or Letter page.
  addEventListener("beforeprint", () => {
    root.classList.add("paper");
    draw((box) => (box.closest(".panels, .pair") ? 320 : 660));
  });
  addEventListener("afterprint", () => {
    root.classList.remove("paper");
    draw();
  });

  // Transcripts by kind, turn and arm; a conversation that has no such turn is hidden with it.
  const transcripts = [...document.querySelectorAll(".transcript")];
  const shown = document.getElementById("shown");
  const kinds = document.getElementById("kinds");
  const arms = document.getElementById("arms");
  const turn = document.getElementById("turn");
  const choose = () => {
    const kind = kinds?.querySelector("input:checked").value || "";
    const number = turn?.value || "";
    const off = new Set([...(arms?.querySelectorAll("input:not(:checked)") || [])].map((box) => box.value));
    for (const transcript of transcripts) {
      const turns = [...transcript.querySelectorAll(".turn")];
      for (const part of turns) part.hidden = number !== "" && part.dataset.turn !== number;
      transcript.hidden = (kind !== "" && transcript.dataset.kind !== kind) || turns.every((part) => part.hidden);
      for (const answer of transcript.querySelectorAll(".answer")) answer.hidden = off.has(answer.dataset.arm);
    }
    const count = transcripts.filter((transcript) => !transcript.hidden).length;
    if (shown) shown.value = count + " of " + transcripts.length + " shown";
  };
  for (const control of [kinds, arms, turn]) control?.addEventListener("change", choose);
  document.getElementById("fold")?.addEventListener("click", (event) => {
    const open = event.target.textContent === "Open all";
    event.target.textContent = open ? "Close all" : "Open all";
    for (const transcript of transcripts) transcript.open = open;
  });
  choose();
})();
