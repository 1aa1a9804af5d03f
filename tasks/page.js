// A hidden text is a button that says so; once opened, its name is the text itself.
function reveal(button, open) {
  button.setAttribute("aria-expanded", open);
  if (open) button.removeAttribute("aria-label");
  else button.setAttribute("aria-label", "Hidden text, may be offensive: show it");
}
document.querySelectorAll("button.blurred").forEach((button) => {
  reveal(button, false);
  button.addEventListener("click", () => reveal(button, button.getAttribute("aria-expanded") === "false"));
});
