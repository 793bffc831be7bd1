"""How reports look."""

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem 1rem; text-align: right; border-bottom: 1px solid #8885; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
iframe { width: 100%; height: 46rem; border: 1px solid #8885; border-radius: 6px; }
.wide { overflow-x: auto; }
.big { font-size: 1.4rem; margin: .5rem 0; }
"""
