// What all pages share: the theme, the list of sections, and how a page starts.

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light theme" : "Dark theme";
  for (const repaint of repaints) repaint();
}

// views [[id, name, section]]: those that are there, below each other, and a link to each.
function showViews(views) {
  const there = views.filter(([, , view]) => view);
  document.getElementById("main").replaceChildren(...there.map(([, , view]) => view));
  const link = ([id, name, view]) => el("a", { href: `#${id}` }, name || view.querySelector("h2").textContent);
  document.getElementById("sections").replaceChildren(...there.map(link));
}

// show(data) shows the page, and returns its title.
async function startPage(show) {
  try {
    const system = matchMedia("(prefers-color-scheme: dark)"), button = document.getElementById("theme");
    let own = false;
    setTheme(system.matches ? "dark" : "light");
    system.addEventListener("change", () => { if (!own) setTheme(system.matches ? "dark" : "light"); });
    button.addEventListener("click", () => { own = true; setTheme(isDark() ? "light" : "dark"); });
    const title = show(await unpack(document.getElementById("data").textContent));
    document.getElementById("title").textContent = title;
    document.title = `${title} – rankpilot study`;
    document.documentElement.dataset.ready = "true";
  } catch (error) {
    document.getElementById("title").textContent = `This page cannot be shown: ${error.message}`;
  }
}
