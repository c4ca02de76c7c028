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

  // What is folded has no width yet: it is drawn when it opens.
  const draw = (width) => {
    const style = getComputedStyle(root);
    for (const { box, figure } of plots) {
      if (!box.clientWidth) continue;
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
  document.addEventListener("toggle", (event) => { if (event.target.querySelector(".plot")) draw(); }, true);
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
    for (const part of document.querySelectorAll(".printed:not([open])")) { part.open = true; part.dataset.wasShut = ""; }
    draw((box) => (box.closest(".panels, .pair") ? 320 : 660));
  });
  addEventListener("afterprint", () => {
    root.classList.remove("paper");
    for (const part of document.querySelectorAll("[data-was-shut]")) { part.open = false; delete part.dataset.wasShut; }
    draw();
  });

  // A table that is wider than its box says so.
  const boxes = [...document.querySelectorAll(".scroll")];
  const measure = () => { for (const box of boxes) box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1); };
  measure();
  addEventListener("resize", measure);
  document.addEventListener("toggle", measure, true);

  // Words that are explained: one tip for all, on hover, tap and focus. Its text is the title, which would else show twice.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  document.body.append(tip);
  const explain = (word) => {
    tip.textContent = word.dataset.means;
    tip.hidden = false;
    word.setAttribute("aria-describedby", "tip");
    const at = word.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(at.left, root.clientWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = (at.bottom + tip.offsetHeight + 8 < innerHeight ? at.bottom + 6 : at.top - tip.offsetHeight - 6) + "px";
  };
  const hush = () => {
    tip.hidden = true;
    document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
  };
  for (const word of document.querySelectorAll(".term")) {
    word.dataset.means = word.title;
    word.removeAttribute("title");
    for (const event of ["pointerenter", "focus", "click"]) word.addEventListener(event, () => { hush(); explain(word); });
    for (const event of ["pointerleave", "blur"]) word.addEventListener(event, hush);
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape") hush(); });
  addEventListener("scroll", hush, { passive: true });

  // The answers that were read: filtered and sorted here, ten at first and 25 more at a time. What models said becomes text, never markup.
  const island = document.getElementById("read-data");
  if (island) {
    const { rows, names, arms: order } = JSON.parse(island.textContent);
    const byId = (id) => document.getElementById("read-" + id);
    const body = document.querySelector("#read tbody");
    const make = (tag, className, ...inside) => {
      const node = document.createElement(tag);
      if (className) node.className = className;
      node.append(...inside);
      return node;
    };
    const told = (value, signed) => (signed && value >= 0 ? "+" : "") + value.toFixed(2).replace("-", "\u2212");
    const scores = (answer) => [
      answer.persona === null ? "not read" : "log-odds " + told(answer.persona, true),
      answer.other_reader !== null && "second reader " + told(answer.other_reader, true),
      answer.relevance !== null && "relevance " + told(answer.relevance),
      answer.z !== null && "z " + told(answer.z),
    ].filter(Boolean).join(", ");
    const said = (answer) => make("p", "", answer.text || "(empty answer)");
    const words = (answer) => answer.text.split(/\s+/).filter(Boolean).length;
    const keys = {
      persona: (row, arm) => row.answers[arm].persona,
      relevance: (row, arm) => row.answers[arm].relevance,
      words: (row, arm) => words(row.answers[arm]),
      rise: (row, arm) => (row.answers[arm].persona === null || (row.answers.base?.persona ?? null) === null
        ? null : row.answers[arm].persona - row.answers.base.persona),
    };
    const everyArm = (row) => {
      const all = make("details", "", make("summary", "", "Every arm"));
      all.addEventListener("toggle", () => {
        if (row.system) all.append(make("p", "said system", make("b", "", "System"), " " + row.system));
        all.append(make("div", "answers", ...order.filter((arm) => arm in row.answers).map((arm) => {
          const heading = make("h3", "", names[arm] + " ", make("span", "n", scores(row.answers[arm])));
          const box = make("div", "answer", heading, said(row.answers[arm]));
          box.style.borderColor = "var(--" + arm.replace("+", "-") + ")";
          return box;
        })));
      }, { once: true });
      return all;
    };
    const drawn = (row, arm) => {
      const answer = row.answers[arm];
      const number = (label, text) => { const cell = make("td", "", text); cell.dataset.label = label; return cell; };
      const place = make("span", "n", row.kind + (row.turn > 1 ? ", turn " + row.turn : ""));
      return make("tr", "",
        number("log-odds", answer.persona === null ? make("span", "n", "not read") : make("b", "", told(answer.persona, true))),
        number("relevance", answer.relevance === null ? "\u2013" : told(answer.relevance)),
        number("words", String(words(answer))),
        make("td", "asked", make("span", "tag", row.suite), " ", make("b", "", row.cluster), " ", place, make("p", "", row.question)),
        make("td", "given", said(answer), everyArm(row)));
    };
    let found = [];
    const more = () => {
      const at = body.childElementCount;
      body.append(...found.slice(at, at + (at ? 25 : 10)).map((row) => drawn(row, byId("arm").value)));
      byId("more").hidden = body.childElementCount >= found.length;
      byId("shown").value = body.childElementCount + " of " + found.length;
    };
    const fill = () => {
      const arm = byId("arm").value;
      const suite = byId("suite")?.value || "";
      const [key, way] = byId("order").value.split(" ");
      const value = (row) => keys[key](row, arm);
      found = rows.filter((row) => arm in row.answers && (suite === "" || row.suite === suite));
      found.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null); // what could not be told comes last
        return way === "up" ? x - y : y - x;
      });
      body.replaceChildren();
      more();
    };
    for (const control of ["suite", "arm", "order"]) byId(control)?.addEventListener("change", fill);
    byId("more").addEventListener("click", more);
    byId("tools").hidden = false;
    fill();
  }

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
  const asked = [...transcripts];
  document.getElementById("order")?.addEventListener("change", (event) => {
    const key = event.target.value;
    const rank = (transcript) => (key in transcript.dataset ? Number(transcript.dataset[key]) * (key === "z" ? 1 : -1) : Infinity);
    const sorted = key === "" ? asked : [...asked].sort((a, b) => rank(a) - rank(b) || 0);
    sorted[0].parentNode.append(...sorted);
  });
  document.getElementById("fold")?.addEventListener("click", (event) => {
    const open = event.target.textContent === "Open all";
    event.target.textContent = open ? "Close all" : "Open all";
    for (const transcript of transcripts) transcript.open = open;
  });
  choose();
})();
