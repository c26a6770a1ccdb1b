"use strict";
/* A formula in a line of text that is wider than the page gets a box of its own, in which it scrolls. */
window.addEventListener("load", async () => {
  if (!window.MathJax || !window.MathJax.startup) return;
  await window.MathJax.startup.promise;
  const fit = () =>
    document.querySelectorAll("article span.math").forEach((formula) => {
      formula.classList.remove("wide");
      const room = formula.closest("p, li, td, dd, h1, h2, h3, h4, summary, article").clientWidth;
      const drawing = formula.querySelector("mjx-container > svg");
      formula.classList.toggle("wide", Boolean(drawing) && drawing.getBoundingClientRect().width > room);
    });
  fit();
  window.addEventListener("resize", fit);
  document.addEventListener("toggle", fit, true);
});

/* Search results with the sentence they come from. Sphinx would fetch every page for that, which browsers refuse on
   file:// pages; here the texts come with searchtexts.js, and a result leads to the section that holds the words. */
document.addEventListener("DOMContentLoaded", () => {
  const results = document.getElementById("search-results");
  if (!results || !window.BOOK_TEXTS) return;
  const stem = (word) => (typeof Stemmer === "undefined" ? word : new Stemmer().stemWord(word));
  const query = new URLSearchParams(location.search).get("q") || "";
  const words = query.toLowerCase().split(/[^\p{Letter}\p{Number}_]+/u).filter(Boolean).map(stem);

  const sectionOf = (name, anchor) => {
    const sections = window.BOOK_TEXTS[name] || [];
    const exact = sections.find((section) => section[0] === anchor);
    if (exact) return exact;
    const hits = ([, title, text]) => {
      const found = (where) => words.filter((word) => where.toLowerCase().includes(word)).length;
      const phrase = text.toLowerCase().includes(query.toLowerCase()) ? 1 : 0;
      return found(`${title} ${text}`) + phrase + found(title) / 2;
    };
    return sections.reduce((best, section) => (hits(section) > (best ? hits(best) : 0) ? section : best), null);
  };

  const context = (text) => {
    const lower = text.toLowerCase();
    const found = words.map((word) => lower.indexOf(word)).filter((at) => at >= 0);
    const phrase = lower.indexOf(query.toLowerCase());
    let start = Math.max((phrase >= 0 ? phrase : found.length ? Math.min(...found) : 0) - 90, 0);
    if (start > 0) start = text.indexOf(" ", start) + 1;
    const line = document.createElement("p");
    line.className = "context";
    line.append(start > 0 ? "… " : "");
    text.slice(start, start + 230).split(/(\s+)/).forEach((piece) => {
      const hit = words.some((word) => piece.toLowerCase().includes(word));
      line.append(hit ? Object.assign(document.createElement("mark"), { textContent: piece }) : piece);
    });
    if (start + 230 < text.length) line.append(" …");
    return line;
  };

  const explain = (item) => {
    const link = item.querySelector("a");
    if (!link || item.classList.contains("kind-object") || item.querySelector(".context")) return;
    const [page, anchor] = link.getAttribute("href").split("#");
    const section = sectionOf(page.replace(/\.html$/, ""), anchor ? `#${anchor}` : "");
    if (!section) return;
    if (!anchor && section[1] && !link.textContent.includes(section[1])) {
      link.setAttribute("href", page + section[0]);
      link.append(` › ${section[1]}`);
    }
    item.append(context(section[2]));
  };

  new MutationObserver(() => results.querySelectorAll("ul.search > li").forEach(explain))
    .observe(results, { childList: true, subtree: true });
});
