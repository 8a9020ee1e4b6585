// Runs before the first paint, so that a chosen theme does not flash; themes.js is the switch.
(() => {
  try {
    const theme = localStorage.getItem("lmcache-theme");
    if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
  } catch {
    // Storage is off: the system's theme.
  }
})();
