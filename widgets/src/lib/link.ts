// What a view needs of Jupyter, and no more: tests and a plain page give their own.
import type { KernelMessage, ViewMessage } from "./protocol";

/** busy: a cell runs, so what is asked may have to wait. gone: restarted, shut down or lost; nothing will ever answer. */
export type KernelState = "live" | "busy" | "gone";

export interface Link {
  send(message: ViewMessage): void;
  /** Returns what ends it. */
  onMessage(receive: (message: KernelMessage, buffers: readonly DataView[]) => void): () => void;
  kernelState(): KernelState;
  onKernelState(changed: () => void): () => void;
}

export function uniqueId(): string {
  // crypto.randomUUID exists only on secure origins; a lab on a plain http address is none.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
