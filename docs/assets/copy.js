// A button beside each block of code that copies it; signatures of the reference are there to be read.
document.querySelectorAll("pre").forEach((block) => {
  if (block.closest(".doc-signature")) return;
  const button = document.createElement("button");
  button.className = "copy";
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", () => {
    const text = block.querySelector("code").innerText;
    navigator.clipboard.writeText(text).then(
      () => { button.textContent = "Copied"; },
      () => { button.textContent = "Select and copy"; },
    );
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  block.appendChild(button);
});
