// The one connection on which everything comes: the mesh's status each second, and what happens in it.

const SILENCE_MS = 4000; // a node that says nothing for so long is taken for gone
const AGAIN_MS = 2000;

export class Feed {
  /** handlers: status(object), event(object), lost(), found(). */
  constructor(handlers) {
    this.handlers = handlers;
    this.isLost = false;
    this.heardAt = performance.now();
    this.source = null;
    this.timer = null;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.close() : this.open()));
    this.open();
    setInterval(() => this.check(), 500);
  }

  open() {
    this.close();
    this.heardAt = performance.now();
    const source = (this.source = new EventSource("cluster/events?status=1"));
    source.addEventListener("status", (message) => {
      this.heard();
      this.handlers.status(JSON.parse(message.data));
    });
    source.addEventListener("cluster", (message) => {
      this.heard();
      this.handlers.event(JSON.parse(message.data));
    });
    source.addEventListener("error", () => {
      this.lose();
      // A browser gives up for good on an answer that is no event stream, as of a node that is full.
      if (source.readyState === EventSource.CLOSED && source === this.source) this.again();
    });
  }

  close() {
    clearTimeout(this.timer);
    this.timer = null;
    this.source?.close();
    this.source = null;
  }

  again() {
    this.close();
    this.timer = setTimeout(() => this.open(), AGAIN_MS);
  }

  heard() {
    this.heardAt = performance.now();
    if (this.isLost) {
      this.isLost = false;
      this.handlers.found();
    }
  }

  lose() {
    if (!this.isLost) {
      this.isLost = true;
      this.handlers.lost();
    }
  }

  check() {
    if (!this.source || document.hidden || performance.now() - this.heardAt < SILENCE_MS) return;
    this.lose();
    this.again(); // it may be a node that stopped without closing its connections
  }
}
