// Typesets what pymdownx.arithmatex marked: \(...\) in spans, \[...\] in blocks.
function typeset(element) {
  const source = element.textContent.trim();
  const displayMode = source.startsWith("\\[");
  const formula = source.replace(/^\\[([]/, "").replace(/\\[)\]]$/, "");
  katex.render(formula, element, { displayMode, throwOnError: false });
}

// Lets a long name in a table break after "_", "." and "(", not in the middle of a word.
function breakAtParts(code) {
  const parts = code.textContent.split(/(?<=[_.(=])(?=\w)/);
  code.replaceChildren(...parts.flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part])));
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".arithmatex").forEach(typeset);
  document.querySelectorAll("article td code").forEach(breakAtParts);
});
