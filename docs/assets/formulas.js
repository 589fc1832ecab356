// Typesets what pymdownx.arithmatex marked: \(...\) in spans, \[...\] in blocks.
document.addEventListener("DOMContentLoaded", () => {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const source = element.textContent.trim();
    const displayMode = source.startsWith("\\[");
    const formula = source.replace(/^\\[([]/, "").replace(/\\[)\]]$/, "");
    katex.render(formula, element, { displayMode, throwOnError: false });
  }
});
