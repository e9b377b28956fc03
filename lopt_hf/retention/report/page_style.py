"""The style sheet of the report's page."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light; --ink: #1c1f23; --faint: #5f6872; --line: #dfe3e8; --worse: #a8331c; --better: #17684a; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1140px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 76ch; margin: .5rem 0; }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; }
.faint { color: var(--faint); font-size: .9rem; }
.worse { color: var(--worse); font-weight: 600; }
.better { color: var(--better); font-weight: 600; }
.findings { list-style: none; padding: 0; max-width: none; }
.findings > li { margin: 0; padding: .55rem 0; border-bottom: 1px solid var(--line); display: grid; gap: .1rem 1.5rem;
  grid-template-columns: minmax(13rem, 1fr) 3.4fr; }
.findings p { margin: 0; max-width: none; font-variant-numeric: tabular-nums; font-size: .95rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: .4rem 0; font-size: .92rem; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
dd dl { margin: 0; font-size: 1em; }
figure { margin: 1.2rem 0 2rem; }
figcaption { color: var(--faint); font-size: .9rem; margin-bottom: .6rem; }
figcaption p { max-width: 90ch; margin: .25rem 0; }
.scroll { overflow-x: auto; }
.scroll img { display: block; width: 100%; min-width: 620px; height: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .42rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; border-bottom-color: var(--ink); }
td { white-space: nowrap; }
td.number, th.number { text-align: right; }
td.label { white-space: normal; min-width: 13rem; }
.scroll .label:first-child { position: sticky; left: 0; background: #fff; }
b span, summary span, h3 span, td span { white-space: nowrap; }
td small { display: block; font-size: .92em; font-weight: 400; color: var(--faint); }
details { margin: .2rem 0; }
details[open] { margin-bottom: 1rem; }
summary { cursor: pointer; padding: .2rem 0; }
@media (max-width: 700px) {
  main { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  .findings > li { grid-template-columns: 1fr; }
  dl { grid-template-columns: 1fr; }
  dd { margin: 0 0 .3rem .8rem; }
  td.label { min-width: 8.5rem; }
}
"""
