// The search runs in a worker, and browsers start none for a page from disk (file:). There, this one takes its place:
// it runs the worker's script in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = "<body></body>"
      this.ready = new Promise((resolve, reject) => {
        this.frame.onload = () => {
          const inside = this.frame.contentWindow
          inside.postMessage = data => setTimeout(() => this.tell(data)) // what the worker says
          const script = inside.document.createElement("script")
          script.src = new URL(url, location.href)
          script.onload = () => resolve(inside)
          script.onerror = reject
          inside.document.body.append(script)
        }
      })
      this.ready.catch(error => this.onerror?.(error))
      document.body.append(this.frame)
    }

    tell(data) {
      const event = new MessageEvent("message", { data: structuredClone(data) })
      this.onmessage?.(event)
      this.dispatchEvent(event)
    }

    postMessage(data) {
      const tell = inside => inside.dispatchEvent(new inside.MessageEvent("message", { data: structuredClone(data) }))
      this.ready.then(inside => setTimeout(() => tell(inside)))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
