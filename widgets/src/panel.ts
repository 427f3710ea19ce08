// The panel's glue to Jupyter: nothing else of it knows what a notebook is.
import type { AnyModel, RenderProps } from "@anywidget/types";
import { jupyterLink, showError } from "./lib/jupyter";
import { RunStore } from "./lib/run_store";
import { createPanel } from "./views/panel";

// Called once for each model. The store is made with it and not with a view: so it hears what the kernel sends unasked
// after a reload, and a second view of the same model is complete at once.
export default () => {
  let store: RunStore;
  return {
    initialize({ model }: { model: AnyModel }) {
      store = new RunStore(jupyterLink(model));
      return () => store.dispose();
    },
    render({ el }: RenderProps) {
      try {
        return createPanel(el, store);
      } catch (error) {
        showError(el, error);
        return undefined;
      }
    },
  };
};
