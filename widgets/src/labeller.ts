// The labeller's glue to Jupyter: nothing else of it knows what a notebook is.
import type { RenderProps } from "@anywidget/types";
import { jupyterLink, showError } from "./lib/jupyter";
import { createLabeller } from "./views/labeller";

export default {
  render({ model, el }: RenderProps) {
    try {
      const link = jupyterLink(model);
      return createLabeller(el, {
        send: (message) => link.send(message),
        onAnswer: (heard) =>
          link.onMessage((message) => {
            if (message.kind === "label_queue" || message.kind === "label_saved" || message.kind === "label_failed") heard(message);
          }),
        gone: () => link.kernelState() === "gone",
        onHealth: (changed) => link.onKernelState(changed),
      });
    } catch (error) {
      showError(el, error);
      return undefined;
    }
  },
};
