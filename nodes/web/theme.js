// Light, dark, or as the system has it; set before anything is drawn.
(() => {
  const KEY = "ai-cluster-theme";
  const THEMES = ["system", "light", "dark"];
  let theme = "system";
  try {
    theme = THEMES.find((name) => name === localStorage.getItem(KEY)) ?? "system";
  } catch { /* storage is switched off: the choice lasts as long as the page */ }

  function apply() {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) button.textContent = `Theme: ${theme}`;
  }

  apply();
  document.addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      try {
        localStorage.setItem(KEY, theme);
      } catch { /* as above */ }
      apply();
    });
  });
})();
