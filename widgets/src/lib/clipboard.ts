/** True where the text is in the clipboard; browsers refuse on plain http and without a recent click. */
export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
