// Plots of the last minutes, drawn by uPlot.

const KEPT = 600; // points that a plot keeps, one per second
const PLOT_HEIGHT = 150;

const clockTime = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

// Width of an axis with these labels, for uPlot. The canvas cuts off what is wider.
function widthOfLabels(plot, labels, at) {
  if (!labels) return 0;
  plot.ctx.font = plot.axes[at].font[0]; // in pixels of the device
  const widest = Math.max(...labels.map((label) => plot.ctx.measureText(label).width));
  return Math.max(62, Math.ceil(widest / devicePixelRatio) + 20);
}

class Plot {
  // lines: names of the lines; text: formats a value; least: least value at the top of the axis
  constructor(parent, title, lines, text, least) {
    this.least = least;
    this.lines = lines;
    this.text = text;
    this.data = [[], ...lines.map(() => [])];
    const box = document.createElement("div"), head = document.createElement("h3");
    this.legend = document.createElement("p");
    this.canvas = document.createElement("div");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `Plot: ${title}`);
    box.className = "plot";
    head.textContent = title;
    box.append(head, this.legend, this.canvas);
    parent.append(box);
    this.values = lines.map((name, at) => {
      const part = document.createElement("span"), mark = document.createElement("i"), value = document.createElement("span");
      mark.style.background = `var(--s${at % 4})`;
      value.textContent = name;
      part.append(mark, value);
      this.legend.append(part);
      return value;
    });
    this.draw();
    new ResizeObserver(() => this.plot.setSize({ width: this.canvas.clientWidth, height: PLOT_HEIGHT })).observe(this.canvas);
  }

  draw() {
    if (this.plot) this.plot.destroy();
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: color("--dim"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    const options = {
      width: this.canvas.clientWidth || 300, height: PLOT_HEIGHT,
      legend: { show: false }, cursor: { show: false }, select: { show: false },
      scales: { y: { range: (_, low, high) => [0, Math.max(this.least, high * 1.1)] } },
      axes: [
        { ...axis, space: 80, values: (_, values) => values.map(clockTime) },
        { ...axis, size: widthOfLabels, space: 26, values: (_, values) => values.map((value) => (value ? this.text(value).replace(/(\.\d*?)0+(?= |$)/, "$1").replace(/\.(?= |$)/, "") : "0")) },
      ],
      series: [{}, ...this.lines.map((name, at) => ({ label: name, stroke: color(`--s${at % 4}`), width: 2, points: { show: false }, spanGaps: false }))],
    };
    this.plot = new uPlot(options, this.data, this.canvas);
  }

  // Adds a point; a value of null is a gap.
  add(time, values) {
    this.data[0].push(time);
    values.forEach((value, at) => {
      this.data[at + 1].push(value === Infinity ? 5 : value);
      const text = `${this.lines[at]} ${this.text(value)}`;
      if (this.values[at].textContent !== text) this.values[at].textContent = text;
    });
    for (const each of this.data) if (each.length > KEPT) each.shift();
    this.plot.setData(this.data);
  }
}
