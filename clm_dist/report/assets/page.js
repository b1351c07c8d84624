"use strict";
// Draws what the element `data` holds, with uPlot. No text of a run is put into the page as HTML: textContent alone.
(() => {
  const { charts, marks } = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const colour = name => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const SIGNS = { restart: "c1", rollback: "c4", skip: "bad", spike: "warn", problem: "bad", kept: "good", checkpoint: "muted" };
  const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });
  const shown = value => {
    const size = Math.abs(value);
    return size && (size < 1e-3) ? value.toExponential(2) : size >= 1e6 ? compact.format(value) : number.format(value);
  };
  const options = { logSteps: false, logValues: false };
  let plots = [];

  // One row of x for all series, as uPlot has it; null where a series has no point of its own.
  function aligned(chart) {
    const kept = (xs, ys) => {
      const at = xs.map((x, i) => i).filter(i => (!options.logSteps || xs[i] > 0) && (!options.logValues || ys[i] > 0));
      return [at.map(i => xs[i]), at.map(i => ys[i])];
    };
    return uPlot.join(chart.series.map(one => kept(one.x, one.y)));
  }

  // Where a series has a point, nearest to the cursor.
  function nearest(plot, series, index) {
    const ys = plot.data[series];
    for (let off = 0; off < ys.length; off++) {
      if (ys[index - off] != null) return index - off;
      if (ys[index + off] != null) return index + off;
    }
    return index;
  }

  function drawMarks(plot, chart) {
    const { ctx, bbox } = plot, unit = uPlot.pxRatio;
    const { min, max } = plot.scales.x;
    const bottom = bbox.top + bbox.height;
    ctx.save();
    ctx.lineWidth = 1.5 * unit;
    const at = step => Math.round(plot.valToPos(step, "x", true));
    const height = value => Math.round(plot.valToPos(value, "y", true));
    const cross = (x, y) => {
      const r = 3.5 * unit;
      ctx.beginPath();
      ctx.moveTo(x - r, y - r); ctx.lineTo(x + r, y + r); ctx.moveTo(x + r, y - r); ctx.lineTo(x - r, y + r);
      ctx.stroke();
    };
    const line = (x, dash, from) => {
      ctx.setLineDash(dash.map(d => d * unit));
      ctx.beginPath(); ctx.moveTo(x, from); ctx.lineTo(x, bottom); ctx.stroke();
      ctx.setLineDash([]);
    };
    const inside = step => step >= min && step <= max;
    for (const mark of marks) {
      if (!inside(mark.step)) continue;
      const x = at(mark.step);
      ctx.strokeStyle = ctx.fillStyle = colour(SIGNS[mark.kind]);
      if (mark.kind === "restart") line(x, [5, 3], bbox.top);
      else if (mark.kind === "rollback") line(x, [1.5, 3], bbox.top);
      else if (mark.kind === "checkpoint") line(x, [], bottom - 6 * unit);
      else if (mark.kind === "skip") cross(x, bbox.top + 6 * unit);
      else {
        const r = 4 * unit, y = bbox.top + 2 * unit;
        ctx.beginPath(); ctx.moveTo(x - r, y); ctx.lineTo(x + r, y); ctx.lineTo(x, y + 1.7 * r); ctx.fill();
      }
    }
    ctx.strokeStyle = colour("bad");
    for (const one of chart.series) for (const [step] of one.missing) if (inside(step)) cross(at(step), bbox.top + 6 * unit);
    const across = (value, text, name, align) => {
      const y = height(value);
      if (y < bbox.top || y > bottom) return;
      ctx.strokeStyle = ctx.fillStyle = colour(name);
      ctx.setLineDash([6 * unit, 4 * unit]);
      ctx.beginPath(); ctx.moveTo(bbox.left, y); ctx.lineTo(bbox.left + bbox.width, y); ctx.stroke();
      ctx.font = `${12 * unit}px system-ui, sans-serif`;
      ctx.textAlign = align;
      const x = align === "right" ? bbox.left + bbox.width - 4 * unit : bbox.left + 4 * unit;
      ctx.fillText(text, x, y + (y < bbox.top + 20 * unit ? 15 : -5) * unit);
    };
    if (chart.expected) {
      const { value, low, high } = chart.expected;
      const from = Math.max(bbox.top, height(high)), to = Math.min(bottom, height(low));
      ctx.fillStyle = colour("good");
      ctx.globalAlpha = .12;
      if (to > from) ctx.fillRect(bbox.left, from, bbox.width, to - from);
      ctx.globalAlpha = 1;
      across(value, `expected at the end ${shown(value)} (${shown(low)} to ${shown(high)})`, "good", "left");
    }
    if (chart.level !== null) across(chart.level, `baseline ${shown(chart.level)}`, "muted", "right");
    ctx.restore();
  }

  // What happened near the cursor, and where a curve has no value.
  function describe(plot, chart, tip) {
    const { left } = plot.cursor;
    const near = step => Math.abs(plot.valToPos(step, "x") - left) < 5;
    const lines = [];
    if (left >= 0 && plot.root.matches(":hover")) {
      for (const mark of marks) {
        if (near(mark.step)) lines.push(`step ${mark.step}: ${mark.text}${mark.also ? ` (and ${mark.also} more)` : ""}`);
      }
      for (const one of chart.series) {
        for (const [step, count] of one.missing) {
          if (near(step)) lines.push(`step ${step}: ${one.label} is not finite${count > 1 ? ` (${count} times from here)` : ""}`);
        }
      }
    }
    tip.hidden = !lines.length;
    tip.textContent = lines.slice(0, 4).join("\n");
    tip.style.whiteSpace = "pre-line";
    if (!lines.length) return;
    const right = left > plot.over.clientWidth / 2;
    const x = plot.over.offsetLeft + plot.root.offsetLeft;
    tip.style.left = right ? "auto" : `${x + left + 10}px`;
    tip.style.right = right ? `${plot.over.clientWidth - left + 22}px` : "auto";
    tip.style.top = "3.2rem";
  }

  // In a logarithmic scale the ticks begin with the least step, so that is a power of ten.
  function stepRange(_, low, high) {
    if (low == null) return [1, 2];
    if (options.logSteps) low = 10 ** Math.floor(Math.log10(low));
    return low < high ? [low, high] : [low, low + 1];
  }

  function range(chart) {
    return (plot, low, high) => {
      if (low == null) return [0, 1];
      const { level, expected } = chart;
      if (level !== null) { low = Math.min(low, level); high = Math.max(high, level); }
      if (expected) { low = Math.min(low, expected.low); high = Math.max(high, expected.high); }
      if (options.logValues) return uPlot.rangeLog(low, high, 10, false);
      return uPlot.rangeNum(low, high, { min: { pad: 0.06, soft: 0, mode: low >= 0 && low < 0.25 * high ? 1 : 3 }, max: { pad: 0.08 } });
    };
  }

  function build(chart) {
    const place = document.getElementById(`chart-${chart.id}`);
    place.replaceChildren();
    const data = aligned(chart);
    if (!data[0].length) { place.textContent = "no values"; return; }
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    const axis = {
      stroke: colour("muted"), font: "12px system-ui, sans-serif", ticks: { stroke: colour("line"), width: 1, size: 5 },
      grid: { stroke: colour("line"), width: 1 },
    };
    const plot = new uPlot({
      width: Math.max(200, place.clientWidth), height: chart.wide ? 340 : 210,
      padding: [10, 24, 0, 0],
      scales: { x: { time: false, distr: options.logSteps ? 3 : 1, range: stepRange }, y: { distr: options.logValues ? 3 : 1, range: range(chart) } },
      axes: [
        { ...axis, size: 34, values: (_, ticks) => ticks.map(tick => tick === null ? "" : compact.format(tick)) },
        { ...axis, size: 62, values: (_, ticks) => ticks.map(tick => tick === null ? "" : shown(tick)) },
      ],
      series: [{ label: "step", value: (_, step) => step == null ? "–" : number.format(Math.round(step)) }].concat(chart.series.map(one => ({
        label: one.label, stroke: colour(one.colour), width: one.width, spanGaps: true,
        points: { show: one.points || one.x.length < 3, size: 7, fill: colour(one.colour) },
        value: (_, value) => value == null ? "–" : shown(value),
      }))),
      cursor: {
        sync: { key: "steps", scales: ["x", null] }, drag: { x: true, y: true, uni: 30, dist: 6 }, dataIdx: (own, series, index) => series ? nearest(own, series, index) : index,
      },
      hooks: { draw: [own => drawMarks(own, chart)], setCursor: [own => describe(own, chart, tip)] },
    }, data, place);
    place.append(tip);
    plots.push(plot);
  }

  function draw() {
    plots.forEach(plot => plot.destroy());
    plots = [];
    charts.forEach(build);
  }

  function fit() {
    for (const plot of plots) {
      const width = plot.root.parentElement.clientWidth;
      if (width && width !== plot.width) plot.setSize({ width, height: plot.height });
    }
  }

  for (const [id, option] of [["log-steps", "logSteps"], ["log-values", "logValues"]]) {
    const box = document.getElementById(id);
    if (!box) continue;
    options[option] = box.checked; // browsers keep it over a reload
    box.addEventListener("change", () => { options[option] = box.checked; draw(); });
  }
  document.getElementById("reset")?.addEventListener("click", draw);
  draw();
  addEventListener("resize", fit);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  // Paper has its own width, and is white.
  const onPaper = is => { root.classList.toggle("print", is); root.style.setProperty("width", is ? "180mm" : ""); draw(); };
  addEventListener("beforeprint", () => onPaper(true));
  addEventListener("afterprint", () => onPaper(false));
})();
